"""On-policy rectification: walks the schedule once and fits each step towards the reference trajectory."""

from typing import Any

from torch import Tensor

from ertacache.history import OutputHistory
from ertacache.rectification import combine, drift_target, fit_rectification
from ertacache.solver import StepCall, affine_step

HISTORY_LENGTH = 4  # computed outputs that a step combines: what an uncached run holds, and three more


class Fitter:
    """Controller that runs a cache schedule on all calibration prompts together and fits as it goes.

    At each step it solves for the coefficients of the last computed outputs, stores them, and takes the step
    with them, so that the next step is fitted on the trajectory that generation will follow.

    Args:
        schedule: computed steps.
        reference: latents x_0 .. x_N of the recorded reference runs, (prompts, ...) each.
        rows: prompts that are fitted to (cross-validation leaves some out); None for all.
        on_computed: rectify computed steps too.
    """

    def __init__(
        self,
        schedule: list[int],
        reference: list[Tensor],
        rows: list[int] | None = None,
        on_computed: bool = True,
    ):
        self.schedule = frozenset(schedule)
        self.reference = reference
        self.rows = rows
        self.on_computed = on_computed
        self.history = OutputHistory(HISTORY_LENGTH)
        self.coefficients: list[list[float]] = []

    def begin(self, scheduler: Any) -> None:
        self.history.clear()
        self.coefficients = []

    def should_compute(self, step: int) -> bool:
        return step in self.schedule

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        computed = step in self.schedule
        if computed:
            self.history.add(call.model_output)
        else:
            self.history.before_reuse()
        if step == 0 or (computed and not self.on_computed):
            self.coefficients.append([1.0])
        else:
            self.coefficients.append(self._fit(step, call, scheduler))
        return combine(self.history, self.coefficients[-1]).to(call.model_output.dtype)

    def _fit(self, step: int, call: StepCall, scheduler: Any) -> list[float]:
        offset, gain = affine_step(scheduler, call)
        if gain == 0:  # a step of length zero, as where a sigma is repeated: no output changes where it leads
            return [1.0]
        reference_next = self.reference[step + 1].to(offset.device).float()
        target = drift_target(reference_next, offset, gain)
        rows = slice(None) if self.rows is None else self.rows
        return fit_rectification([h[rows] for h in self.history], target[rows])

    def after_step(self, step: int, sample: Tensor) -> None:
        if step + 1 in self.schedule:
            self.history.before_computing()

    def end(self) -> None:
        self.history.clear()
