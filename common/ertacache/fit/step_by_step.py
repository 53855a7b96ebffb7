"""Stage 3: fit the steps one after the other, on the accelerated trajectory itself.

At step i the coefficients are solved for towards o* = (x_ref_{i+1} - F_i(x_i)) / c_i, the output that puts the drifted
state back on the reference; the step is then taken with them, so that the next one is fitted where it will start from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients, Row
from ertacache.channels import ChannelMatrices, Layout, StepChannels, StepMatrices
from ertacache.fit.channels import fit_channels
from ertacache.fit.least_squares import fit_combination
from ertacache.fit.runs import Runs
from ertacache.solver import StepCall, affine_step


@dataclass(frozen=True)
class Form:
    """What a step may combine; the more, the better for the prompts that are fitted to, and the worse for too few.

    Attributes:
        outputs: computed outputs, at most.
        layout: of the latents, whose channels then have coefficients of their own; None for shared ones.
    """

    outputs: int
    layout: Layout | None = None


SAFE_FORM = Form(outputs=3)  # where nothing tells more: four outputs can do worse than three with 16 prompts
REFINED_FORM = Form(outputs=4)  # where the coefficients are fitted end to end afterwards


class StepFit(Cache):
    """Solve for the coefficients of each step in turn.

    Args:
        schedule: the computed steps.
        reference: latents x_0 .. x_N of the recorded runs, (P, ...) each.
        rows: prompts that are fitted to, while all of them run; None for all.
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
        form: Form = SAFE_FORM,
        on_computed: bool = True,
        given: Coefficients | None = None,
        first: int = 1,
    ):
        super().__init__(schedule, Coefficients.of_outputs([[1.0] * form.outputs]))  # whose length alone matters
        self.reference, self.fitted_rows, self.layout = reference, rows, form.layout
        self.on_computed, self.given, self.first = on_computed, given or Coefficients.of_outputs([]), first

    def start(self, device: torch.device) -> Cache:
        self.fitted_outputs: list[list[float]] = []
        self.fitted_channels: list[StepMatrices] = []
        return super().start(device)

    def fitted(self) -> Coefficients:
        """What was fitted, or given."""
        channels = ChannelMatrices(self.layout, self.fitted_channels) if self.layout is not None else None
        latents = [*self.given.latents, *[0.0] * len(self.fitted_outputs)][: len(self.fitted_outputs)]
        return Coefficients(self.fitted_outputs, latents, channels)

    def row(self, step: int, call: Call, scheduler: Any) -> Row:
        assert isinstance(call, StepCall)
        known = step < len(self.given.outputs)
        outputs, latents = (self.given.outputs[step], self.given.latents[step]) if known else ([1.0], 0.0)
        matrices = self.given.channels.steps[step] if known and self.given.channels else []
        if step >= self.first and (self.on_computed or step not in self.schedule):
            outputs, matrices = self._fit(step, latents, call, scheduler)
        self.fitted_outputs.append(outputs)
        self.fitted_channels.append(matrices)
        placed: StepChannels | None = None
        if matrices and self.layout is not None:
            placed = ChannelMatrices(self.layout, [matrices]).on(call.sample.device)[0]
        return Row(outputs, latents, placed)

    def _fit(self, step: int, latents: float, call: StepCall, scheduler: Any) -> tuple[list[float], StepMatrices]:
        offset, gain = affine_step(scheduler, call)
        if gain == 0:  # a step of length zero, as where a sigma is repeated: no output changes where it leads
            return [1.0], []
        target = (self.reference[step + 1].to(offset.device).float() - offset) / gain
        if latents:
            target = target - latents * call.sample.float()
        rows: Any = slice(None) if self.fitted_rows is None else list(self.fitted_rows)
        target, columns = target[rows], [output[rows] for output in self.history]
        row = fit_combination(columns, target)
        return row, fit_channels(columns, target, row, self.layout).tolist() if self.layout is not None else []


def fit_step_by_step(runs: Runs, schedule: Sequence[int], form: Form = SAFE_FORM) -> Coefficients:
    """Coefficients of every step, fitted on one run along the schedule: K evaluations a prompt."""
    fit = StepFit(schedule, runs.record.latents, form=form)
    runs.latents(fit)
    return fit.fitted()


def fit_last_step(runs: Runs, schedule: Sequence[int], given: Coefficients, form: Form) -> Coefficients:
    """The same coefficients but for the last step's, fitted once more to where the others lead."""
    fit = StepFit(schedule, runs.record.latents, form=form, given=given, first=runs.record.num_steps - 1)
    runs.latents(fit)
    return fit.fitted()


def left_out_errors(runs: Runs, schedule: Sequence[int], form: Form, folds: int) -> Tensor:
    """Squared errors (P,) of the final latents, each prompt under coefficients that were fitted without it."""
    errors = torch.zeros(len(runs))
    for fold in range(folds):
        left_out = list(range(fold, len(runs), folds))
        rows = [row for row in range(len(runs)) if row not in left_out]
        errors[left_out] = runs.errors(StepFit(schedule, runs.record.latents, rows, form=form))[left_out]
    return errors
