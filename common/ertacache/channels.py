"""Coefficients of their own for each channel of the latents, and in it for coarse and for fine structure.

A channel or a band of spatial frequencies with much power takes shape early in a run and one with little late, so
their outputs change at different times and one coefficient for all of them is a compromise. For Gaussian data the
velocity of each frequency is a multiple of its latents, with a factor that depends on its power alone; so such
coefficients are what a linear prediction can use. Coarse is the mean over 2x2 places, fine is what is left: the two
are orthogonal, and so are the channels, so every group is a small least-squares problem of its own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ertacache.weighting import REWEIGHTINGS, prompt_weights

Array = NDArray[np.float64]
Terms = list[list[list[float]]]  # of one step: (bands, outputs, channels), coarse before fine; empty for none

BANDS = 2  # coarse, fine
PATCH = 4  # values of a channel in a packed token, a square of 2x2
AXES = (-4, -3, -1)  # that channels may lie at
MAX_CHANNELS = 256
RIDGE = 1e-4  # relative to the diagonal, towards the coefficients that all groups share
DECIMALS = 5  # that are kept, so that files stay small


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

    def grouped(self, tensor: Tensor) -> Tensor:
        """A view whose channels lie at `channel_axis`."""
        return tensor.unflatten(-1, (-1, PATCH)) if self.packed else tensor

    @property
    def channel_axis(self) -> int:
        return -2 if self.packed else self.axis

    def channels_of(self, shape: Sequence[int]) -> int:
        """How many there are in latents of that shape, with a batch or without."""
        return shape[-1] // PATCH if self.packed else shape[self.axis]

    def shaped(self, values: Tensor) -> Tensor:
        """Values of channels (C,) in a shape that multiplies a grouped tensor."""
        return values.view(-1, *[1] * (-self.channel_axis - 1))

    def coarse(self, grouped: Tensor) -> Tensor:
        """The mean over 2x2 places, at each of them; a place at an odd edge has fewer."""
        if self.packed:
            return grouped.mean(-1, keepdim=True).expand_as(grouped)
        height, width = grouped.shape[-2:]
        planes = grouped.reshape(-1, 1, height, width)
        means = functional.avg_pool2d(planes, 2, ceil_mode=True, count_include_pad=False)
        spread = means.repeat_interleave(2, -2)[..., :height, :].repeat_interleave(2, -1)[..., :width]
        return spread.reshape(grouped.shape)


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
class Deviations:
    """What the coefficients of groups add to the shared ones at one step.

    Attributes:
        coarse, fine: (outputs, channels) float32, on the device of the outputs.
    """

    coarse: Tensor
    fine: Tensor
    layout: Layout

    def add_to(self, total: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add sum_j d_j o_j to `total` (float32), in place.

        Args:
            outputs: the newest computed output first.
        """
        outputs = list(outputs)[: len(self.fine)]
        if not self.layout.packed:
            # a bare model's output may have more channels than the latents: variances, which keep the shared ones
            axis, count = self.layout.axis, self.fine.shape[-1]
            total, outputs = total.narrow(axis, 0, count), [output.narrow(axis, 0, count) for output in outputs]
        parts = torch.zeros_like(total)
        for output, fine, difference in zip(outputs, *self._multipliers, strict=False):
            total.addcmul_(output, fine)
            parts.addcmul_(output, difference)
        grouped = self.layout.grouped(total)
        grouped.add_(self.layout.coarse(self.layout.grouped(parts)))  # the mean is taken once, of the sum

    @functools.cached_property
    def _multipliers(self) -> tuple[list[Tensor], list[Tensor]]:
        """What multiplies each output, and what does before the mean is taken; of a shape that broadcasts."""
        made = [
            [row.repeat_interleave(PATCH) if self.layout.packed else self.layout.shaped(row) for row in rows]
            for rows in (self.fine, self.coarse - self.fine)
        ]
        return made[0], made[1]


@dataclass(frozen=True)
class ChannelTerms:
    """The deviations of every step, as a calibration file has them.

    Attributes:
        steps: for each step (bands, outputs, channels), coarse before fine; empty where the shared ones serve all.
    """

    layout: Layout
    steps: list[Terms]
    _on_device: dict[torch.device, list[Deviations | None]] = field(default_factory=dict, compare=False, repr=False)

    def at(self, step: int, device: torch.device) -> Deviations | None:
        """Those of one step. The first call for a device copies all steps to it, so that no later one waits."""
        if device not in self._on_device:
            self._on_device[device] = self._copied(device)
        return self._on_device[device][step]

    def _copied(self, device: torch.device) -> list[Deviations | None]:
        flat = torch.tensor([v for step in self.steps for band in step for row in band for v in row])
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            flat = flat.pin_memory()
        values = flat.to(device, non_blocking=True).split([_size(step) for step in self.steps])
        return [_deviations(step, own, self.layout) for step, own in zip(self.steps, values, strict=True)]


def deviations_of(terms: Terms, layout: Layout, device: torch.device) -> Deviations | None:
    """Those of one step that was just fitted; None where there are none."""
    return ChannelTerms(layout, [terms]).at(0, device)


def _size(terms: Terms) -> int:
    return len(terms) * len(terms[0]) * len(terms[0][0]) if terms else 0


def _deviations(terms: Terms, values: Tensor, layout: Layout) -> Deviations | None:
    if not terms:
        return None
    coarse, fine = values.view(len(terms), len(terms[0]), -1).unbind(0)
    return Deviations(coarse, fine, layout)


def fit_channels(columns: Sequence[Tensor], target: Tensor, shared: Sequence[float], layout: Layout) -> Array:
    """What the coefficients of each group differ by from the shared ones, (bands, outputs, channels).

    Args:
        columns: the m computed outputs, newest first, (P, ...) each.
        target: the output that is wanted, (P, ...).
        shared: m coefficients, towards which the ridge shrinks.

    Prompts weigh as in `rectification.fit_rectification`.
    """
    grams = _group_grams([*columns, target], layout)  # (P, bands, C, m + 1, m + 1)
    matrices, vectors, squares = grams[..., :-1, :-1], grams[..., :-1, -1], grams[..., -1, -1]
    plain = np.asarray(shared)
    errors = _errors(matrices, vectors, squares, np.broadcast_to(plain, vectors.shape[1:]))
    solution: Array = np.zeros(vectors.shape[1:])
    for _ in range(REWEIGHTINGS if len(squares) > 1 else 1):
        weights = prompt_weights(errors)
        matrix = np.tensordot(weights, matrices, 1)
        vector = np.tensordot(weights, vectors, 1)
        diagonal = np.maximum(np.einsum("bcii->bci", matrix), 1e-300)
        ridged = matrix + RIDGE * np.einsum("bci,ij->bcij", diagonal, np.eye(len(plain)))
        rest = vector - matrix @ plain
        solution = plain + np.linalg.solve(ridged, rest[..., None])[..., 0]
        errors = _errors(matrices, vectors, squares, solution)
    return np.round(np.moveaxis(solution - plain, -1, 1), DECIMALS)


def _group_grams(tensors: Sequence[Tensor], layout: Layout) -> Array:
    """Inner products of the tensors in each group of each prompt, (P, bands, C, m, m) in float64."""
    prompts = []
    for prompt in range(len(tensors[0])):  # one at a time, since the float64 copies of videos are large
        bands = []
        for tensor in tensors:
            grouped = layout.grouped(tensor[prompt].double())
            coarse = layout.coarse(grouped)
            bands.append(torch.stack([coarse, grouped - coarse]).movedim(layout.channel_axis, 1).flatten(2))
        stacked = torch.stack(bands, dim=2)  # (bands, C, m, values)
        prompts.append((stacked @ stacked.transpose(-1, -2)).cpu().numpy())
    return np.stack(prompts)


def _errors(matrices: Array, vectors: Array, squares: Array, solution: Array) -> Array:
    """Squared error of each prompt, over all groups."""
    quadratic = np.einsum("bci,pbcij,bcj->p", solution, matrices, solution)
    linear = np.einsum("pbci,bci->p", vectors, solution)
    return np.asarray(np.maximum(squares.sum((1, 2)) - 2 * linear + quadratic, 0))
