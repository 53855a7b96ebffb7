"""Run the published method (arXiv 2508.21091): residual reuse, its error model, and its adjusted grid.

What it takes from the uncached runs is fitted in fit/published.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache import solver
from ertacache.cache import Cache, Call, Coefficients

MIN_FACTOR = 0.05  # of phi: the paper clips at 0, but a zero step repeats a sigma, which multistep solvers make NaN of
# What phi measures the error of reuse by: |o_i|_1, or |o_i - o_{i+1}|_1. Both are quoted; see docs/method.md.
PHI_OVER = ("output", "change")


class PublishedCache(Cache):
    """Reuse the residual r = o - x of the last computed step, less its modelled error, on the adjusted grid.

    Args:
        error_model: for each step (K, B) of the error sigma(K o~ + B), or None; None for no error model.
        grid: the adjusted grid; None for the scheduler's own.
    """

    def __init__(
        self,
        schedule: Iterable[int],
        error_model: Sequence[Sequence[float] | None] | None,
        grid: "AdjustedGrid | None" = None,
    ):
        super().__init__(schedule, Coefficients.of_outputs([]))
        self.error_model, self.grid = error_model, grid
        self.residual: Tensor | None = None
        self.dtype = torch.float32  # of the model output

    def begin(self, scheduler: Any) -> Cache:
        if self.grid is not None:
            self.grid.put_on(scheduler)
        return super().begin(scheduler)

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        if step in self.schedule:
            self.residual, self.dtype = call.model_output.float() - call.sample.float(), call.model_output.dtype
            return call.model_output
        assert self.residual is not None  # step 0 is computed
        reused = call.sample.float() + self.residual
        pair = self.error_model[step] if self.error_model else None
        if pair is not None:
            reused = rectify(reused, *pair)
        return reused.to(self.dtype)

    def end(self) -> None:
        self.residual = None


def rectify(reused: Tensor, k: float, b: float) -> Tensor:
    """o~ - (z / 4 + 1 / 2) with z = K o~ + B: the reused output less its modelled error, in its own dtype."""
    as_float = reused.float()
    return (as_float - ((k * as_float + b) / 4 + 0.5)).to(reused.dtype)


@dataclass(frozen=True)
class AdjustedGrid:
    """A grid whose reused steps are shorter.

    Attributes:
        sigmas, timesteps: the adjusted ones, N + 1 or N values, in the one or the other.
        original_sigmas, original_timesteps: of the grid that was adjusted.
    """

    sigmas: Sequence[float] | None
    timesteps: Sequence[float] | None
    original_sigmas: Sequence[float]
    original_timesteps: Sequence[float]

    def put_on(self, scheduler: Any) -> None:
        """Put the grid into a scheduler whose own is set."""
        if self.sigmas is not None:
            times = timesteps_on(self.sigmas, self.original_sigmas, self.original_timesteps)
            scheduler.sigmas = torch.tensor(self.sigmas).to(scheduler.sigmas)
            scheduler.timesteps = torch.tensor(times).to(scheduler.timesteps)
        elif self.timesteps is not None:
            solver.put_on_timesteps(scheduler, self.timesteps)


def timesteps_on(adjusted: Sequence[float], sigmas: Sequence[float], timesteps: Sequence[float]) -> list[float]:
    """The timesteps (N) that the model is given on an adjusted grid: interpolated from the original pairs.

    Below the last of these it goes towards timestep 0 at sigma 0.
    """
    pairs = [(0.0, 0.0), *sorted(zip(sigmas, timesteps, strict=False))]
    return np.interp(adjusted[: len(timesteps)], *np.transpose(pairs)).tolist()
