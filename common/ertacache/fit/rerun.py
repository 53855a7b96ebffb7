"""Run a schedule with given coefficients, and with some of the computed outputs given too."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients
from ertacache.fit.store import TrajectoryStore


class GivenOutput:
    """A call of the scheduler's step whose model output is known."""

    def __init__(self, model_output: Tensor, sample: Tensor):
        self.model_output, self.sample = model_output, sample


class Rerun(Cache):
    """Play coefficients; the transformer runs only where an output is not given.

    Args:
        schedule: the computed steps.
        given: outputs (P, ...) of the first computed steps, as many as there are.
        store: keeps the others in `outputs`, on the host; None keeps none.
        fills: run the transformer at step 0 all the same, since it keeps there what later steps read.
    """

    def __init__(
        self,
        schedule: Sequence[int],
        coefficients: Coefficients,
        given: Sequence[Tensor] = (),
        store: TrajectoryStore | None = None,
        fills: bool = False,
    ):
        super().__init__(schedule, coefficients)
        self.store, self.fills = store, fills
        self.given = dict(zip(schedule, given, strict=False))
        self.outputs: list[Tensor] = []

    def computes(self, step: int) -> bool:
        return step in self.schedule and (step not in self.given or (self.fills and step == 0))

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        if step in self.given:
            like = call.model_output
            call = GivenOutput(self.given[step].to(like.device, like.dtype), call.sample)
        elif step in self.schedule and self.store is not None:
            self.outputs.append(self.store.keep(call.model_output))
        return super().output(step, call, scheduler)
