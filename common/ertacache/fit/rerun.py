"""Run a schedule with given coefficients, and with some of the computed outputs given too."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients
from ertacache.fit.store import TrajectoryStore
from ertacache.solver import StepCall


class Rerun(Cache):
    """Play coefficients; the transformer runs only where an output is not given.

    Args:
        schedule: the computed steps.
        given: outputs (P, ...) of the first computed steps, as many as there are.
        store: keeps the others in `outputs`, on the host; None keeps none.
    """

    def __init__(
        self,
        schedule: Sequence[int],
        coefficients: Coefficients,
        given: Sequence[Tensor] = (),
        store: TrajectoryStore | None = None,
    ):
        super().__init__(schedule, coefficients)
        self.store = store
        self.given = dict(zip(schedule, given, strict=False))
        self.outputs: list[Tensor] = []

    def computes(self, step: int) -> bool:
        return step in self.schedule and step not in self.given

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        if step in self.given:
            assert isinstance(call, StepCall)
            call = call.with_output(self.given[step].to(call.model_output.device, call.model_output.dtype))
        elif step in self.schedule and self.store is not None:
            self.outputs.append(self.store.keep(call.model_output))
        return super().output(step, call, scheduler)
