"""Matrices of channels as unknowns of a descent: their scale, the run that carries their gradients, and its parts.

The unknowns are those of `channel_fitting.fit_channels`, a matrix for every difference between a cached output and the
next older one, at the last step of each segment. Such differences are small and alike, so steps of one length in all
of them would be far too long for some and lost in others; they are whitened first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache.arrays import Array
from ertacache.channel_fitting import DECIMALS, MATRIX_RIDGE, channel_grams, neighbour_differences
from ertacache.channels import ChannelMatrices, Layout, PlacedMatrices
from ertacache.gradients import check_passes
from ertacache.rectification import Coefficients, combine
from ertacache.rerun import Rerun
from ertacache.solver import StepCall

LEAST_POWER = 1e-6  # of a channel of the differences, relative to the largest; what is below is noise of arithmetic
SCALE = 2e-3  # how far one unit of an unknown moves the state, relative to the initial latents


@dataclass
class MatrixUnknowns:
    """Unknowns Z (outputs x channels from, channels to) of each step that has any, with what they mean.

    The matrices of differences are L Z, with L L^T proportional to the inverse of the Gram matrix of what they are
    multiplied with; so one unit moves the state equally far in every direction.

    Attributes:
        base: step -> what the matrices of outputs are at Z = 0, (outputs, channels, channels).
        whitening: step -> L.
        values: step -> Z; float64 on the host, like the others.
    """

    layout: Layout
    base: dict[int, Tensor]
    whitening: dict[int, Tensor]
    values: dict[int, Tensor]

    def at(self, step: int) -> Tensor:
        """What channels of each output add at a step, (outputs, channels, channels)."""
        by_difference = (self.whitening[step] @ self.values[step]).view(self.base[step].shape)
        # to outputs, as `neighbour_differences` says: each less what the one before takes
        newer = torch.cat([torch.zeros_like(by_difference[:1]), by_difference[:-1]])
        return self.base[step] + by_difference - newer

    def coefficients(self, others: Coefficients) -> Coefficients:
        """Those of a calibration; `others` for all that does not vary."""
        steps = [others.of_step(step)[2] for step in range(len(others.outputs))]
        for step in self.values:
            steps[step] = np.round(self.at(step).detach().numpy(), DECIMALS).tolist()
        return Coefficients(others.outputs, others.latents_coefficients, ChannelMatrices(self.layout, steps))


def whitened(
    grams: dict[int, Array], gains: Sequence[float], latents: Tensor, start: Coefficients, layout: Layout
) -> MatrixUnknowns:
    """Matrices of channels at `start`, scaled by what they are multiplied with.

    Args:
        grams: of `GramRun`.
        gains: of each step: how far its output moves the state.
        latents: the initial ones (prompts, ...).
    """
    made = MatrixUnknowns(layout, {}, {}, {})
    length = SCALE * float(latents.float().std()) * latents[0].numel() ** 0.5
    for step, gram in grams.items():
        outputs, channels = gram.shape[:2]
        to_differences = neighbour_differences(outputs)
        gram = np.einsum("ij,jckd,lk->icld", to_differences, gram, to_differences).reshape(outputs * channels, -1)
        diagonal = np.diag(gram)
        if not diagonal.max() > 0 or gains[step] == 0:
            continue  # nothing that could move the state
        ridge = MATRIX_RIDGE * np.maximum(diagonal, LEAST_POWER * diagonal.max())
        factor = np.linalg.inv(np.linalg.cholesky(gram + np.diag(ridge))).T
        base = start.of_step(step)[2] or np.zeros((outputs, channels, channels))
        made.base[step] = torch.tensor(base, dtype=torch.float64)
        made.whitening[step] = torch.from_numpy(factor * (length / abs(gains[step])))
        made.values[step] = torch.zeros(outputs * channels, channels, dtype=torch.float64, requires_grad=True)
    return made


class GramRun(Rerun):
    """A run with given coefficients that measures what is combined at some steps.

    After a run: `grams`, for each of them the inner products of the channels of the cached outputs, (outputs,
    channels, outputs, channels), a mean over `rows`.
    """

    def __init__(self, schedule: list[int], start: Coefficients, layout: Layout, steps: list[int], rows: list[int]):
        super().__init__(schedule, start)
        self.layout, self.steps, self.rows = layout, steps, rows
        self.grams: dict[int, Array] = {}

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        output = super().model_output(step, call, scheduler)
        if step in self.steps:
            combined = list(self.history)[: len(self.coefficients.outputs[step])]
            self.grams[step] = channel_grams([o[self.rows] for o in combined], self.layout).mean(0)
        return output


class MatrixRun:
    """Controller like `Rerun` whose final latents carry gradients for the matrices.

    Its outputs are not copied, since a copy would be without gradient.
    """

    def __init__(self, schedule: list[int], start: Coefficients, matrices: MatrixUnknowns):
        self.computed, self.start, self.matrices = frozenset(schedule), start, matrices
        self.outputs: list[Tensor] = []

    def begin(self, scheduler: Any) -> None:
        self.outputs = []

    def should_compute(self, step: int) -> bool:
        return step in self.computed

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        if step in self.computed:
            check_passes(call.model_output, needed=call.sample.requires_grad)
            self.outputs = [call.model_output, *self.outputs][: self.start.longest]
        row, latents, latents_coefficient, matrices = self.start.at(step, call.sample)
        if step in self.matrices.values:
            values = self.matrices.at(step).to(latents.device, torch.float32)
            matrices = PlacedMatrices(values, self.matrices.layout)
        return combine(self.outputs, row, latents, latents_coefficient, matrices).to(call.model_output.dtype)

    def after_step(self, step: int, sample: Tensor) -> None:
        """Nothing is kept of it."""

    def end(self) -> None:
        self.outputs = []
