"""Finds the step at which a run stopped being finite, reading from the device once, at the end of the run."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ertacache.errors import NumericsError


class FiniteCheck:
    """Keeps one sum for each step, on the device that the outputs are on.

    A sum is finite only where every term is (up to sums beyond float32's 3e38, which no model output survives),
    and costs one small kernel a step; `verify` reads them all at once.
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def see(self, output: Tensor) -> None:
        """The output that the scheduler gets at the next step, any shape."""
        if not output.is_meta:  # a run on meta tensors has shapes only
            self.sums.append(output.detach().sum(dtype=torch.float32))

    def verify(self, first: int, was_computed: Callable[[int], bool]) -> None:
        """Raise NumericsError naming the first step that is not finite; then forget what was seen.

        Args:
            first: the step of the first sum that is kept.
            was_computed: whether a step was computed, for the message.
        """
        sums, self.sums = self.sums, []
        if not sums:
            return
        for step, value in enumerate(torch.stack(sums).tolist(), first):
            if not math.isfinite(value):
                kind = "computed" if was_computed(step) else "reused"
                raise NumericsError(
                    f"the model output at step {step} ({kind}) holds NaN or Inf, so the result would too; in float16 "
                    "an overflow is likely: use bfloat16 or float32"
                )

    def forget(self) -> None:
        self.sums = []
