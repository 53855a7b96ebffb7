"""On-policy rectification: walks the schedule once and fits each step towards the reference trajectory."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ertacache.channel_fitting import fit_channels
from ertacache.channels import ChannelMatrices, Layout, StepMatrices, placed
from ertacache.history import OutputHistory
from ertacache.rectification import Coefficients, combine, drift_target, fit_rectification
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


class Fitter:
    """Controller that runs a cache schedule on all calibration prompts together and fits as it goes.

    At each step it solves for the coefficients of the last computed outputs, stores them, and takes the step
    with them, so that the next step is fitted on the trajectory that generation will follow.

    Args:
        schedule: computed steps.
        reference: latents x_0 .. x_N of the recorded reference runs, (prompts, ...) each.
        rows: prompts that are fitted to (cross-validation leaves some out); None for all.
        on_computed: rectify computed steps too.
        form: what a step may combine.
        given: coefficients of the steps that are not fitted.
        start: the first step that is fitted.
    """

    def __init__(
        self,
        schedule: list[int],
        reference: list[Tensor],
        rows: list[int] | None = None,
        on_computed: bool = True,
        form: Form = SAFE_FORM,
        given: Coefficients | None = None,
        start: int = 1,
    ):
        self.schedule = frozenset(schedule)
        self.reference = reference
        self.rows = rows
        self.on_computed, self.layout = on_computed, form.layout
        self.given, self.start = given or Coefficients.of_outputs([]), start
        self.history = OutputHistory(form.outputs)
        self.outputs: list[list[float]] = []
        self.latents_coefficients: list[float] = []
        self.matrices: list[StepMatrices] = []

    def begin(self, scheduler: Any) -> None:
        self.history.clear()
        self.outputs, self.latents_coefficients, self.matrices = [], [], []

    def fitted(self) -> Coefficients:
        """What was fitted in the last run, or given."""
        matrices = ChannelMatrices(self.layout, self.matrices) if self.layout is not None else None
        return Coefficients(self.outputs, self.latents_coefficients, matrices)

    def should_compute(self, step: int) -> bool:
        return step in self.schedule

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        computed = step in self.schedule
        if computed:
            self.history.add(call.model_output)
        else:
            self.history.before_reuse()
        given = self.given.of_step(step) if step < len(self.given.outputs) else ([1.0], 0.0, [])
        row, latents_coefficient, matrices = given
        if step >= self.start and (self.on_computed or not computed):
            row, matrices = self._fit(step, latents_coefficient, call, scheduler)
        self.outputs.append(row)
        self.latents_coefficients.append(latents_coefficient)
        self.matrices.append(matrices)
        # of this step alone: what was fitted before is not copied again
        here = placed(matrices, self.layout, call.sample.device) if self.layout is not None else None
        return combine(self.history, row, call.sample, latents_coefficient, here).to(call.model_output.dtype)

    def _fit(
        self, step: int, latents_coefficient: float, call: StepCall, scheduler: Any
    ) -> tuple[list[float], StepMatrices]:
        offset, gain = affine_step(scheduler, call)
        if gain == 0:  # a step of length zero, as where a sigma is repeated: no output changes where it leads
            return [1.0], []
        rows = slice(None) if self.rows is None else self.rows
        reference_next = self.reference[step + 1][: len(offset)].to(offset.device).float()
        target = drift_target(reference_next, offset, gain)
        if latents_coefficient:
            target = target - latents_coefficient * call.sample.float()
        target, columns = target[rows], [h[rows] for h in self.history]
        row = fit_rectification(columns, target)
        return row, fit_channels(columns, target, row, self.layout).tolist() if self.layout is not None else []

    def after_step(self, step: int, sample: Tensor) -> None:
        if step + 1 in self.schedule:
            self.history.before_computing()

    def end(self) -> None:
        self.history.clear()
