"""Records an uncached reference run: latents and model outputs of all prompts in lockstep."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache.solver import StepCall, affine_step, host_grid, takes_timesteps
from ertacache.trajectory import TrajectoryStore

GRAM_VALUES = 2**23  # float64 values that the Gram matrix works on at a time: 64 MiB, whatever the trajectories


class Recorder:
    """Controller that computes every step and keeps what it sees.

    After the run: `latents` x_0 .. x_N and `outputs` o_0 .. o_{N-1}, each (prompts, ...) on the host in the
    run's own dtype, `gains` c_0 .. c_{N-1}, the grid, and whether it can be changed in its timesteps.

    Args:
        memory_limit: bytes of latents and outputs, 2 N + 1 tensors, that may stay in memory; above it all of them go
            to files in the system's temporary folder. None for no limit.
    """

    def __init__(self, memory_limit: int | None = None) -> None:
        self.memory_limit = memory_limit
        self.on_begin: Callable[[Recorder], None] = lambda _: None  # the grid is known, nothing was computed yet
        self.on_first_step: Callable[[Recorder], None] = lambda _: None  # its cost and sizes are known by then
        self.store = TrajectoryStore(memory_limit)
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.gains: list[float] = []
        self.timesteps: list[float] = []
        self.sigmas: list[float] = []
        self.takes_timesteps = False

    def begin(self, scheduler: Any) -> None:
        self.store = TrajectoryStore(self.memory_limit)
        self.latents, self.outputs, self.gains = [], [], []
        self.timesteps, self.sigmas = host_grid(scheduler)
        self.takes_timesteps = takes_timesteps(scheduler)
        self.on_begin(self)

    def should_compute(self, step: int) -> bool:
        return True

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        if step == 0:
            steps = len(self.timesteps)
            self.store.plan((steps + 1) * _num_bytes(call.sample) + steps * _num_bytes(call.model_output))
            self.latents.append(self.store.keep(call.sample))
        self.outputs.append(self.store.keep(call.model_output))
        self.gains.append(affine_step(scheduler, call)[1])
        return call.model_output

    def after_step(self, step: int, sample: Tensor) -> None:
        self.latents.append(self.store.keep(sample))
        if step == 0:
            self.on_first_step(self)

    def end(self) -> None:
        """What was recorded stays."""

    @property
    def num_steps(self) -> int:
        return len(self.outputs)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gram_matrix(outputs: list[Tensor]) -> np.ndarray:
    """G[i, j] = <o_i, o_j> / numel, pooled over prompts, (N, N) float64.

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


def residuals(recorded: Recorder, rows: list[int] | None = None) -> list[Tensor]:
    """r_i = o_i - x_i for all steps, optionally of some prompts only; float32."""
    pairs = zip(recorded.outputs, recorded.latents, strict=False)
    chosen = slice(None) if rows is None else rows
    return [o[chosen].float() - x[chosen].float() for o, x in pairs]


def residual_distances(residual: list[Tensor]) -> np.ndarray:
    """D[j, i] = |r_j - r_i|_1 / |r_i|_1 for all pairs, the norms averaged over prompts; (N, N) float64."""
    num_steps = len(residual)
    distances = np.zeros((num_steps, num_steps))
    norms = [float(r.abs().double().mean()) for r in residual]
    for j in range(num_steps):
        for i in range(j + 1, num_steps):
            difference = float((residual[j] - residual[i]).abs().double().mean())
            distances[j, i] = difference / max(norms[i], 1e-12)
            distances[i, j] = difference / max(norms[j], 1e-12)
    return distances
