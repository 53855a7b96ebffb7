"""Runs a cache schedule with given coefficients, and with some of the computed outputs given too."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ertacache.history import OutputHistory
from ertacache.rectification import Coefficients, combine
from ertacache.solver import StepCall
from ertacache.trajectory import TrajectoryStore


class Rerun:
    """Controller with fixed coefficients; the transformer runs only where an output is not given.

    After a run: `outputs`, those of the computed steps in order, on the host.

    Args:
        schedule: computed steps.
        coefficients: of every step.
        given: outputs (prompts, ...) of the first computed steps, as many as there are.
        store: keeps `outputs`; None keeps none.
    """

    def __init__(
        self,
        schedule: Sequence[int],
        coefficients: Coefficients,
        given: Sequence[Tensor] = (),
        store: TrajectoryStore | None = None,
    ):
        self.coefficients = coefficients
        self.computed = frozenset(schedule)
        self.given = dict(zip(schedule, given, strict=False))
        self.store = store
        self.outputs: list[Tensor] = []
        self.history = OutputHistory(coefficients.longest)

    def begin(self, scheduler: Any) -> None:
        self.history.clear()
        self.outputs = []

    def should_compute(self, step: int) -> bool:
        return step in self.computed and step not in self.given

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        if step in self.computed:
            output = call.model_output
            if step in self.given:
                output = self.given[step].to(output.device, output.dtype)
            elif self.store is not None:
                self.outputs.append(self.store.keep(output))
            self.history.add(output)
        else:
            self.history.before_reuse()
        return combine(self.history, *self.coefficients.at(step, call.sample)).to(call.model_output.dtype)

    def after_step(self, step: int, sample: Tensor) -> None:
        if step + 1 in self.computed:
            self.history.before_computing()

    def end(self) -> None:
        self.history.clear()
