"""Finds the step at which a run stopped being finite, reading from the device once, at the end of the run."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ertacache.errors import NumericsError


class FiniteCheck:
    """Keeps one sum for each output, on the device that the outputs are on.

    A sum is finite only where every term is (up to sums beyond float32's 3e38, which no model output survives),
    and costs one small kernel an output; `verify` reads them all at once.
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.steps: list[int] = []  # of each sum

    def see(self, step: int, output: Tensor) -> None:
        """An output of a step, of any shape; a step may have several, as where guidance calls the model twice."""
        if not output.is_meta:  # a run on meta tensors has shapes only
            output = output.detach() if output.requires_grad else output
            self.sums.append(output.sum(dtype=torch.float32))
            self.steps.append(step)

    def verify(self, was_computed: Callable[[int], bool]) -> None:
        """Raise NumericsError naming the first step that is not finite; then forget what was seen.

        Args:
            was_computed: whether a step was computed, for the message.
        """
        sums, steps = self.sums, self.steps
        self.forget()
        if not sums:
            return
        for step, value in zip(steps, torch.stack(sums).tolist(), strict=True):
            if not math.isfinite(value):
                kind = "computed" if was_computed(step) else "reused"
                raise NumericsError(
                    f"the model output at step {step} ({kind}) holds NaN or Inf, so the result would too; in float16 "
                    "an overflow is likely: use bfloat16 or float32"
                )

    def forget(self) -> None:
        self.sums, self.steps = [], []
