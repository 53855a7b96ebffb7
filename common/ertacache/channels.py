"""Coefficients of their own for the channels of the latents: each output channel combines all channels.

A direction in channel space with much power takes shape early in a run and one with little late, so their outputs
change at different times and one coefficient for all of them is a compromise. For Gaussian data the velocity is a
linear map of the latents, which mixes channels as their covariance does; so a matrix for each cached output is what
a linear prediction can use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

StepMatrices = list[list[list[float]]]  # M_j of one step: (outputs, channels from, channels to); empty for none

KEPT_BYTES = 2**20  # of a run's matrices in the form for tokens; larger ones are made at each step
PATCH = 4  # values of a channel in a packed token, a square of 2x2
CHANNEL_AXES = (-4, -3, -1)  # that channels may lie at
MAX_CHANNELS = 64  # more would need more prompts than calibrations have


@dataclass(frozen=True)
class Layout:
    """Where the channels of latents are.

    Attributes:
        axis: of the channels, counted from the end; in packed tokens (..., channels x 2 x 2) it is -1.
    """

    axis: int

    @property
    def packed(self) -> bool:
        return self.axis == -1

    def channels_of(self, shape: Sequence[int]) -> int:
        """How many there are in latents of that shape, with a batch or without."""
        return shape[-1] // PATCH if self.packed else shape[self.axis]

    def rows(self, tensor: Tensor) -> Tensor:
        """The values of a tensor as (places, channels)."""
        if self.packed:
            return tensor.unflatten(-1, (-1, PATCH)).transpose(-1, -2).flatten(0, -2)
        return tensor.movedim(self.axis, -1).flatten(0, -2)


def layout_of(latents: Sequence[int], in_channels: int | None) -> Layout | None:
    """The layout of latents of that shape, batch included; None where it cannot be told.

    Packed tokens have three axes, as FLUX's; pictures have four; videos five, the channels before the frames or
    after them (CogVideoX), which the number of channels that the transformer takes tells.
    """
    if len(latents) == 3:
        layout, whole = Layout(-1), latents[-1] % PATCH == 0
    elif len(latents) in (4, 5):
        after_frames = len(latents) == 4 or in_channels == latents[-3] != latents[-4]
        layout, whole = Layout(-3 if after_frames else -4), True
    else:
        return None
    return layout if whole and layout.channels_of(latents) <= MAX_CHANNELS else None


@dataclass(frozen=True)
class PlacedMatrices:
    """The matrices of channels of one step where they are needed: what they add to the shared coefficients.

    Attributes:
        matrices: for each output what its channels, as rows, add to the channels of the sum, as columns; float32 on
            the device of the outputs, (outputs, channels, channels).
        of_tokens: what packed tokens of all outputs side by side are multiplied with, the shared coefficients
            included, (outputs x values, values); None where that is not kept.
    """

    matrices: Tensor
    layout: Layout
    of_tokens: Tensor | None = None

    def add_to(self, total: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add sum_j M_j^T o_j to `total` (float32), in place.

        Makes no temporaries of its size where both are float32 and contiguous; of half precision it copies one output
        at a time.

        Args:
            outputs: the newest computed output first.
        """
        if not total.is_contiguous():
            dense = total.contiguous()
            self.add_to(dense, outputs)
            total.copy_(dense)
            return
        if self.layout.packed:
            rows = total.view(-1, total.shape[-1])
            for output, matrix in zip(outputs, _of_tokens(self.matrices), strict=False):
                rows.addmm_(output.float().reshape(rows.shape), matrix)
            return
        channels = self.matrices.shape[-1]
        part = self._channels(total)
        for output, matrix in zip(outputs, self.matrices, strict=False):
            part.baddbmm_(matrix.T.expand(len(part), channels, channels), self._channels(output.float()))

    def with_shared(self, shared: Sequence[float]) -> "PlacedMatrices":
        """With `of_tokens`, for the a_j of the step; as it is where those are of another number of outputs."""
        if len(shared) != len(self.matrices):
            return self
        wide = _of_tokens(self.matrices)
        for coefficient, matrix in zip(
            shared, wide, strict=True
        ):  # one by one, since numbers need no copy to the device
            matrix.diagonal().add_(coefficient)
        return PlacedMatrices(self.matrices, self.layout, wide.flatten(0, 1))

    def sum_of_tokens(self, outputs: Sequence[Tensor]) -> Tensor:
        """sum_j (a_j o_j + M_j^T o_j) in float32, as one product, where `of_tokens` is kept."""
        assert self.of_tokens is not None
        count = min(len(outputs), len(self.matrices))
        beside = torch.cat([outputs[index].float() for index in range(count)], -1)
        return beside @ self.of_tokens[: beside.shape[-1]]

    def _channels(self, tensor: Tensor) -> Tensor:
        """(n, channels, places) of a tensor, its own memory where it is contiguous.

        A bare model's output may have more channels than the latents: variances, which keep the shared ones.
        """
        axis, channels = self.layout.axis, self.matrices.shape[-1]
        places = math.prod(tensor.shape[axis + 1 :])
        return tensor.contiguous().narrow(axis, 0, channels).view(-1, channels, places)


@dataclass(frozen=True)
class ChannelMatrices:
    """The matrices of every step, as a calibration file has them in `channel_coefficients`.

    Attributes:
        steps: for each step (outputs, channels, channels); empty where the shared ones serve all.
    """

    layout: Layout
    steps: list[StepMatrices]
    _on_device: dict[torch.device, list[PlacedMatrices | None]] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> list[PlacedMatrices | None]:
        """Those of every step on a device, to which they are copied once."""
        if device not in self._on_device:
            self._on_device[device] = self._copied(device)
        return self._on_device[device]

    def with_shared(self, shared: list[list[float]], device: torch.device) -> list[PlacedMatrices | None]:
        """The same, made ready for a single product where matrices of packed tokens are small.

        Not where float32 products may be rounded to TF32: the shared coefficients do better apart from them there.

        Args:
            shared: for each step the a_j.
        """
        found = self.on(device)
        size = sum(one.matrices.nbytes for one in found if one is not None)
        rounded = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        if not self.layout.packed or size * PATCH**2 > KEPT_BYTES or rounded:
            return found
        return [one if one is None else one.with_shared(row) for one, row in zip(found, shared, strict=True)]

    def _copied(self, device: torch.device) -> list[PlacedMatrices | None]:
        flat = torch.tensor([v for step in self.steps for matrix in step for row in matrix for v in row])
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            flat = flat.pin_memory()
        values = flat.to(device, non_blocking=True).split([_size(step) for step in self.steps])
        return [_placed_step(step, own, self.layout) for step, own in zip(self.steps, values, strict=True)]


def placed(matrices: StepMatrices, layout: Layout, device: torch.device) -> PlacedMatrices | None:
    """Those of one step that was just fitted; None where there are none."""
    return ChannelMatrices(layout, [matrices]).on(device)[0]


def _size(step: StepMatrices) -> int:
    return len(step) * len(step[0]) * len(step[0][0]) if step else 0


def _placed_step(step: StepMatrices, values: Tensor, layout: Layout) -> PlacedMatrices | None:
    return PlacedMatrices(values.view(len(step), len(step[0]), -1), layout) if step else None


def _of_tokens(matrices: Tensor) -> Tensor:
    """The same for packed tokens, with the four values of a channel treated alike; 16 times as large."""
    count, channels = matrices.shape[:2]
    wide = matrices.new_zeros(count, channels, PATCH, channels, PATCH)
    wide.diagonal(dim1=2, dim2=4).copy_(matrices[..., None])
    return wide.view(count, channels * PATCH, -1)
