"""Coefficients of the channels' own: matrices M_j by which each channel of the output combines all channels.

Calibration files may hold them (`channel_coefficients`); M_j adds to the coefficient a_j that all channels share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

StepMatrices = list[list[list[float]]]  # M_j of one step: (outputs, channels from, channels to); empty for none

PATCH = 4  # values of a channel in a packed token, a square of 2x2
CHANNEL_AXES = (-4, -3, -1)  # that channels may lie at
MAX_CHANNELS = 64


@dataclass(frozen=True)
class Layout:
    """Where the channels of latents are: their axis from the end, -1 for packed tokens (..., channels x 2 x 2)."""

    axis: int

    @property
    def packed(self) -> bool:
        return self.axis == -1

    def channels_of(self, shape: Sequence[int]) -> int:
        """How many there are in latents of that shape, with a batch or without."""
        return shape[-1] // PATCH if self.packed else shape[self.axis]


class StepChannels(NamedTuple):
    """The matrices of one step on a device, (outputs, channels from, channels to), float32."""

    matrices: Tensor
    layout: Layout


@dataclass(frozen=True)
class ChannelMatrices:
    """The matrices of every step; a step without any has an empty list."""

    layout: Layout
    steps: list[StepMatrices]

    def on(self, device: torch.device) -> list[StepChannels | None]:
        """Those of each step on a device, in one copy; None for a step without any."""
        values = [v for step in self.steps for matrix in step for row in matrix for v in row]
        flat = torch.tensor(values, dtype=torch.float32)  # a file may hold whole numbers
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            flat = flat.pin_memory()
        sizes = [len(step) * len(step[0]) * len(step[0][0]) if step else 0 for step in self.steps]
        parts = flat.to(device, non_blocking=True).split(sizes)
        return [
            StepChannels(part.view(len(step), len(step[0]), -1), self.layout) if step else None
            for step, part in zip(self.steps, parts, strict=True)
        ]


def add_channels(total: Tensor, outputs: Sequence[Tensor], channels: StepChannels) -> None:
    """Add sum_j M_j^T o_j to `total`, in place.

    Args:
        total: float32, in the shape of an output.
        outputs: the newest computed output first.
    """
    matrices, layout = channels
    if not total.is_contiguous():
        dense = total.contiguous()
        add_channels(dense, outputs, channels)
        total.copy_(dense)
        return
    if layout.packed:
        rows = total.view(-1, total.shape[-1])
        for output, matrix in zip(outputs, _of_tokens(matrices), strict=False):
            rows.addmm_(output.float().reshape(rows.shape), matrix)
        return
    count = matrices.shape[-1]
    part = _channels(total, layout.axis, count)
    for output, matrix in zip(outputs, matrices, strict=False):
        part.baddbmm_(matrix.T.expand(len(part), count, count), _channels(output.float(), layout.axis, count))


def _channels(tensor: Tensor, axis: int, count: int) -> Tensor:
    """(n, channels, places) of a tensor, its own memory where it is contiguous; without what lies beside the channels.

    A bare model's output may have more channels than the latents: variances, which keep the shared coefficients.
    """
    places = math.prod(tensor.shape[axis + 1 :])
    return tensor.contiguous().narrow(axis, 0, count).view(-1, count, places)


def _of_tokens(matrices: Tensor) -> Tensor:
    """The same for packed tokens, with the four values of a channel treated alike; 16 times as large."""
    count, channels = matrices.shape[:2]
    wide = matrices.new_zeros(count, channels, PATCH, channels, PATCH)
    wide.diagonal(dim1=2, dim2=4).copy_(matrices[..., None])
    return wide.view(count, channels * PATCH, -1)
