"""Stage 1: record the uncached runs of all calibration prompts in lockstep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients
from ertacache.fit.store import TrajectoryStore
from ertacache.solver import StepCall, affine_step, host_grid, takes_timesteps

Array = NDArray[np.float64]  # what the host computes with, whatever dtype a run has
GRAM_VALUES = 2**23  # float64 values that the Gram matrix works on at a time: 64 MiB, whatever the trajectories


class Rows(Sequence[Tensor]):
    """Some rows of each of several tensors, taken when one is read, so that a subset needs no memory."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[int]):
        self.tensors, self.rows = tensors, list(rows)
        first, last = min(self.rows, default=0), max(self.rows, default=-1)
        # neighbours are a view, anything else a copy
        self.index: Any = slice(first, last + 1) if self.rows == list(range(first, last + 1)) else self.rows

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, step: Any) -> Any:
        return self.tensors[step][self.index]


@dataclass(frozen=True)
class Record:
    """The uncached runs of P prompts over N steps.

    Attributes:
        latents: after the step before, x_0 .. x_N, (P, ...) each, on the host in the run's own dtype.
        outputs: of the model after guidance, o_0 .. o_{N-1}, likewise.
        gains: c_0 .. c_{N-1} of the solver's steps x' = F + c o.
        timesteps, sigmas: the grid, N and N + 1 values (no sigmas: empty).
        takes_timesteps: whether the grid can be changed in its timesteps.
        pixels: decoded results in [0, 1], (P, ...).
        memory_limit: bytes of trajectories that may stay in memory; None for no limit.
    """

    latents: Sequence[Tensor]
    outputs: Sequence[Tensor]
    gains: list[float]
    timesteps: list[float]
    sigmas: list[float]
    takes_timesteps: bool
    pixels: Tensor
    memory_limit: int | None = None

    def __len__(self) -> int:
        return len(self.latents[0])

    @property
    def num_steps(self) -> int:
        return len(self.outputs)

    def subset(self, rows: Sequence[int]) -> "Record":
        """The record of some prompts, with tensors of their own."""
        return replace(
            self, latents=Rows(self.latents, rows), outputs=Rows(self.outputs, rows), pixels=self.pixels[list(rows)]
        )

    def squared_errors(self, final: Tensor) -> Tensor:
        """Mean squared error of final latents (P, ...) to the recorded ones, (P,)."""
        return (final - self.latents[-1].float()).square().flatten(1).mean(1)


class Recording(Cache):
    """Compute every step and keep what passes by.

    Args:
        memory_limit: bytes of latents and outputs, 2 N + 1 tensors, that may stay in memory; above it all of them go
            to files in the system's temporary folder. None for no limit.
        on_begin: told the number of steps, before anything is computed.
    """

    def __init__(self, memory_limit: int | None = None, on_begin: Callable[[int], None] = lambda _: None) -> None:
        super().__init__((), Coefficients.of_outputs([]))
        self.memory_limit, self.on_begin = memory_limit, on_begin

    def begin(self, scheduler: Any) -> Cache:
        """Forget what was recorded, and begin anew."""
        self.store = TrajectoryStore(self.memory_limit)
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.gains: list[float] = []
        self.timesteps, self.sigmas = host_grid(scheduler)
        self.takes_timesteps = takes_timesteps(scheduler)
        self.on_begin(len(self.timesteps))
        return self

    def computes(self, step: int) -> bool:
        return True

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        assert isinstance(call, StepCall)
        if step == 0:
            steps = len(self.timesteps)
            self.store.plan((steps + 1) * call.sample.nbytes + steps * call.model_output.nbytes)
            self.latents.append(self.store.keep(call.sample))
        self.outputs.append(self.store.keep(call.model_output))
        self.gains.append(affine_step(scheduler, call)[1])
        return call.model_output

    def stepped(self, step: int, latents: Tensor) -> None:
        """Keep the latents after a step."""
        self.latents.append(self.store.keep(latents))

    def record(self, pixels: Tensor) -> Record:
        """What was recorded."""
        return Record(
            self.latents,
            self.outputs,
            self.gains,
            self.timesteps,
            self.sigmas,
            self.takes_timesteps,
            pixels,
            self.memory_limit,
        )


def gram_matrix(outputs: Sequence[Tensor]) -> Array:
    """G[i, j] = <o_i, o_j> / numel, pooled over prompts, (N, N).

    In pieces of GRAM_VALUES values, so that its memory does not grow with the trajectories.
    """
    num_steps = len(outputs)
    flat = [output.flatten() for output in outputs]
    size = flat[0].numel()
    gram = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    width = max(1, GRAM_VALUES // num_steps)
    for start in range(0, size, width):
        piece = torch.stack([values[start : start + width].double() for values in flat])  # (N, width)
        gram += piece @ piece.T
    return ((gram + gram.T) / (2 * size)).numpy()
