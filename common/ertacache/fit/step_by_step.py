"""Stage 3: fit the steps one after the other, on the accelerated trajectory itself.

At step i the coefficients are solved for towards o* = (x_ref_{i+1} - F_i(x_i)) / c_i, the output that puts the drifted
state back on the reference; the step is then taken with them, so that the next one is fitted where it will start from.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients, Row
from ertacache.fit.least_squares import grams, solve_products
from ertacache.fit.record import Array, Record
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs
from ertacache.fit.store import TrajectoryStore
from ertacache.solver import StepCall, affine_step

OUTPUTS = 6  # computed outputs that a step may combine


Solve = Callable[[int, Array], list[float]]


class StepFit(Rerun):
    """Solve for the coefficients of each step in turn.

    Args:
        schedule: the computed steps.
        reference: latents x_0 .. x_N of the recorded runs, (P, ...) each.
        rows: prompts that are fitted to, while all of them run; None for all.
        outputs: computed outputs that a step may combine.
        on_computed: fit computed steps too.
        given: coefficients of the steps before `first`, and the latents' coefficients of all.
        first: the first step that is fitted.
        solve: a step and the inner products (P, m + 1, m + 1) of its outputs and its target -> its coefficients; the
            least squares of these rows by default.
        known, store: outputs of the first computed steps, and what keeps the others; as for `Rerun`.
    """

    def __init__(
        self,
        schedule: Sequence[int],
        reference: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        *,
        outputs: int = OUTPUTS,
        on_computed: bool = True,
        given: Coefficients | None = None,
        first: int = 1,
        solve: Solve | None = None,
        known: Sequence[Tensor] = (),
        store: TrajectoryStore | None = None,
    ):
        combined = Coefficients.of_outputs([[1.0] * outputs])  # whose length alone matters
        super().__init__(schedule, combined, known, store)
        self.steps, self.reference, self.fitted_rows, self.solve = schedule, reference, rows, solve or self._solved
        self.on_computed, self.start_with, self.first = on_computed, given or Coefficients.of_outputs([]), first

    def part(self, reference: Sequence[Tensor], **changes: Any) -> "StepFit":
        """The same fit of some other runs."""
        options = {"outputs": self.coefficients.longest, "on_computed": self.on_computed, **changes}
        return StepFit(self.steps, reference, **options)

    def start(self, device: torch.device) -> Cache:
        self.fitted_outputs: list[list[float]] = []
        return super().start(device)

    def fitted(self) -> Coefficients:
        """What was fitted, or given."""
        steps = len(self.fitted_outputs)
        return Coefficients(self.fitted_outputs, [*self.start_with.latents, *[0.0] * steps][:steps])

    def row(self, step: int, call: Call, scheduler: Any) -> Row:
        known = step < len(self.start_with.outputs)
        outputs, latents = (self.start_with.outputs[step], self.start_with.latents[step]) if known else ([1.0], 0.0)
        if step >= self.first and (self.on_computed or step not in self.schedule):
            assert isinstance(call, StepCall)
            outputs = self._fit(step, latents, call, scheduler)
        self.fitted_outputs.append(outputs)
        return Row(outputs, latents)

    def _fit(self, step: int, latents: float, call: StepCall, scheduler: Any) -> list[float]:
        offset, gain = affine_step(scheduler, call)
        if gain == 0:  # a step of length zero, as where a sigma is repeated: no output changes where it leads
            return [1.0]
        target = (self.reference[step + 1].to(offset.device).float() - offset) / gain
        if latents:
            target = target - latents * call.sample.float()
        return self.solve(step, grams([*self.history, target]))

    def _solved(self, step: int, products: Array) -> list[float]:
        return solve_products(products if self.fitted_rows is None else products[list(self.fitted_rows)])


class Fittable(Protocol):
    """Runs that a fit can be played in: `Runs`, or `Together`."""

    @property
    def record(self) -> Record: ...

    def latents(self, cache: Any) -> Any:
        """Make the runs under a cache."""


def fit_step_by_step(runs: Fittable, schedule: Sequence[int]) -> Coefficients:
    """Fit every step on one run along the schedule: K evaluations a prompt."""
    fit = StepFit(schedule, runs.record.latents)
    runs.latents(fit)
    return fit.fitted()


def fit_last_step(runs: Runs, schedule: Sequence[int], given: Coefficients) -> Coefficients:
    """The same coefficients but for the last step's, fitted once more to where the others lead."""
    fit = StepFit(schedule, runs.record.latents, given=given, first=runs.record.num_steps - 1)
    runs.latents(fit)
    return fit.fitted()
