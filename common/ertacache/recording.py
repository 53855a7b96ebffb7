"""Records an uncached reference run: latents and model outputs of all prompts in lockstep."""

from typing import Any

import numpy as np
from torch import Tensor

from ertacache.solver import StepCall, affine_step, host_grid, takes_timesteps


class Recorder:
    """Controller that computes every step and keeps what it sees.

    After the run: `latents` x_0 .. x_N and `outputs` o_0 .. o_{N-1}, each (prompts, ...) on the host in the
    run's own dtype, `gains` c_0 .. c_{N-1}, the grid, and whether it can be changed in its timesteps.
    """

    def __init__(self) -> None:
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.gains: list[float] = []
        self.timesteps: list[float] = []
        self.sigmas: list[float] = []
        self.takes_timesteps = False

    def begin(self, scheduler: Any) -> None:
        self.latents, self.outputs, self.gains = [], [], []
        self.timesteps, self.sigmas = host_grid(scheduler)
        self.takes_timesteps = takes_timesteps(scheduler)

    def should_compute(self, step: int) -> bool:
        return True

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        if step == 0:
            self.latents.append(call.sample.detach().cpu())
        self.outputs.append(call.model_output.detach().cpu())
        self.gains.append(affine_step(scheduler, call)[1])
        return call.model_output

    def after_step(self, step: int, sample: Tensor) -> None:
        self.latents.append(sample.detach().cpu())

    def end(self) -> None:
        """What was recorded stays."""

    @property
    def num_steps(self) -> int:
        return len(self.outputs)


def gram_matrix(outputs: list[Tensor]) -> np.ndarray:
    """G[i, j] = <o_i, o_j> / numel, pooled over prompts, (N, N) float64."""
    num_steps = len(outputs)
    gram = np.zeros((num_steps, num_steps))
    for i in range(num_steps):
        row = outputs[i].double().flatten()
        for j in range(i, num_steps):
            gram[i, j] = gram[j, i] = float(row @ outputs[j].double().flatten()) / row.numel()
    return gram


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
        for i in range(num_steps):
            if i != j:
                distances[j, i] = float((residual[j] - residual[i]).abs().double().mean()) / max(norms[i], 1e-12)
    return distances
