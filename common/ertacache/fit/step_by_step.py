"""Stage 3: fit the steps one after the other, on the accelerated trajectory itself.

At step i the coefficients are solved for towards o* = (x_ref_{i+1} - F_i(x_i)) / c_i, the output that puts the drifted
state back on the reference; the step is then taken with them, so that the next one is fitted where it will start from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients, Row
from ertacache.fit.least_squares import fit_combination
from ertacache.fit.record import Record
from ertacache.fit.runs import Runs
from ertacache.solver import affine_step

OUTPUTS = 6  # computed outputs that a step may combine


class StepFit(Cache):
    """Solve for the coefficients of each step in turn.

    Args:
        schedule: the computed steps.
        reference: latents x_0 .. x_N of the recorded runs, (P, ...) each.
        rows: prompts that are fitted to, while all of them run; None for all.
        outputs: computed outputs that a step may combine.
        on_computed: fit computed steps too.
        given: coefficients of the steps before `first`, and the latents' coefficients of all.
        first: the first step that is fitted.
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
    ):
        super().__init__(schedule, Coefficients.of_outputs([[1.0] * outputs]))  # whose length alone matters
        self.reference, self.fitted_rows = reference, rows
        self.on_computed, self.given, self.first = on_computed, given or Coefficients.of_outputs([]), first

    @classmethod
    def of(
        cls, record: Record, schedule: Sequence[int], prompts: Sequence[int] | None = None, **options: Any
    ) -> "StepFit":
        """Fit all streams of a record, each to its own latents; to some prompts, or to all of them."""
        rows = None if prompts is None else record.rows_of(prompts)
        made = cls(schedule, record.latents, rows, **options)
        made.streams = [cls(schedule, stream.latents, rows) for stream in record.streams]
        return made

    def start(self, device: torch.device) -> Cache:
        self.fitted_outputs: list[list[float]] = []
        return super().start(device)

    def fitted(self) -> Coefficients:
        """What was fitted, or given."""
        steps = len(self.fitted_outputs)
        streams = tuple(stream.fitted() for stream in self.streams if isinstance(stream, StepFit))
        return Coefficients(self.fitted_outputs, [*self.given.latents, *[0.0] * steps][:steps], streams=streams)

    def row(self, step: int, call: Call, scheduler: Any) -> Row:
        known = step < len(self.given.outputs)
        outputs, latents = (self.given.outputs[step], self.given.latents[step]) if known else ([1.0], 0.0)
        if step >= self.first and (self.on_computed or step not in self.schedule):
            outputs = self._fit(step, latents, call, scheduler)
        self.fitted_outputs.append(outputs)
        return Row(outputs, latents)

    def _fit(self, step: int, latents: float, call: Call, scheduler: Any) -> list[float]:
        offset, gain = affine_step(scheduler, call)
        rows: Any = slice(None) if self.fitted_rows is None else list(self.fitted_rows)
        columns = [output[rows] for output in self.history]
        target = self.reference[step + 1].to(offset.device).float() - offset
        if isinstance(gain, Tensor):  # some elements move further than others, or not at all
            if latents:
                target = target - gain * latents * call.sample.float()
            return fit_combination([gain[rows] * column for column in columns], target[rows])
        if gain == 0:  # a step of length zero, as where a sigma is repeated: no output changes where it leads
            return [1.0]
        target = target / gain
        if latents:
            target = target - latents * call.sample.float()
        return fit_combination(columns, target[rows])


def fit_step_by_step(runs: Runs, schedule: Sequence[int]) -> Coefficients:
    """Fit every step on one run along the schedule: K evaluations a prompt."""
    fit = StepFit.of(runs.record, schedule)
    runs.latents(fit)
    return fit.fitted()


def fit_last_step(runs: Runs, schedule: Sequence[int], given: Coefficients) -> Coefficients:
    """The same coefficients but for the last step's, fitted once more to where the others lead."""
    fit = StepFit(schedule, runs.record.latents, given=given, first=runs.record.num_steps - 1)
    runs.latents(fit)
    return fit.fitted()
