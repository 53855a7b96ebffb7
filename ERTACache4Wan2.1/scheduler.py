"""Wan's samplers on the noise grid of the official code, or on diffusers' own.

The official code starts UniPC at sigma 0.999 and DPM++ at sigma 1. diffusers from 0.37 on starts at 1 and ends
higher, so that more than half of the timesteps at 50 steps differ; DPM++ differs too. Both grids are shifted by
sigma' = s sigma / (1 + (s - 1) sigma), end at 0, and give the model timesteps 1000 sigma'.
"""

from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

SOLVERS = ("unipc", "dpm++", "euler")
GRIDS = ("official", "diffusers")
# The official schedulers take it from a float32 tensor, and the float32 rounding shows in the last bits.
UNIPC_SIGMA_MAX = float(np.float32(0.999))


def even_sigmas(sigma_max: float, num_steps: int) -> np.ndarray:
    """(num_steps,) float64, evenly spaced from `sigma_max` towards 0, which is left out; not shifted yet."""
    return np.linspace(sigma_max, 0, num_steps + 1)[:-1]


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """sigma' = s sigma / (1 + (s - 1) sigma): more of the steps at high noise for a shift s above 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class OfficialUniPCScheduler(UniPCMultistepScheduler):
    """UniPC on the official grid; a grid that the caller gives (unshifted sigmas) goes before it."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        """Put the run on a grid.

        Args:
            num_inference_steps: N, for the official grid.
            device: of the timesteps, which are 0 to 1000.
            sigmas: unshifted noise levels in [0, 1], N of them, which go before the official ones.
            mu: as in diffusers.
        """
        if sigmas is None:
            sigmas = even_sigmas(UNIPC_SIGMA_MAX, num_inference_steps)
        super().set_timesteps(device=device, sigmas=np.asarray(sigmas), mu=mu)


class OfficialDPMScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ of order 2 on the official grid.

    Its first sigma is exactly 1, where log(alpha) is minus infinity; that is harmless, since the first step is of
    first order (exp of minus infinity is 0) and the second one divides its difference by infinity.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Put the run on a grid.

        Args:
            num_inference_steps: N, for the official grid.
            device: of the timesteps, which are 0 to 1000.
            timesteps: N of them, which go before the official ones.
            mu: as in diffusers.
        """
        super().set_timesteps(num_inference_steps, device=device, mu=mu, timesteps=timesteps)
        if timesteps is not None:
            return
        sigmas = shifted(even_sigmas(1.0, num_inference_steps), self.config.flow_shift)
        times = (sigmas * self.config.num_train_timesteps).astype(np.int64)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
        self.timesteps = torch.from_numpy(times).to(device)


class OfficialEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler on the sigmas of the official UniPC, since the official code has no Euler of its own."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Put the run on a grid.

        Args:
            num_inference_steps: N, for the official grid.
            device: of the timesteps, which are 0 to 1000.
            sigmas, timesteps: unshifted noise levels in [0, 1], or timesteps; they go before the official ones.
            mu: as in diffusers.
        """
        if sigmas is None and timesteps is None:
            sigmas = even_sigmas(UNIPC_SIGMA_MAX, num_inference_steps)
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)


def make_scheduler(solver: str, grid: str, flow_shift: float) -> Any:
    """The scheduler for a solver ("unipc", "dpm++", "euler") on a grid ("official", "diffusers")."""
    official = grid == "official"
    if solver == "euler":
        kind = OfficialEulerScheduler if official else FlowMatchEulerDiscreteScheduler
        return kind(shift=flow_shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift, "solver_order": 2}
    if solver == "unipc":
        return (OfficialUniPCScheduler if official else UniPCMultistepScheduler)(**flow)
    return (OfficialDPMScheduler if official else DPMSolverMultistepScheduler)(**flow, algorithm_type="dpmsolver++")
