"""CogVideoX's two schedulers on any grid of timesteps.

The stock ones step to `t - 1000 // N`, whatever comes next in the grid: at 28 or 30 steps that is one off on
many steps, and a grid of one's own is refused. Those here step to the timestep that does come next and take
fractional timesteps. Where N divides 1000 they are bit-identical to the stock ones.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput
from torch import Tensor

TIMESTEP_TOLERANCE = 1e-3  # what float32 may lose of a timestep between 0 and 999


class AnyGrid:
    """Mixin for a CogVideoX scheduler class: any falling timesteps, and steps to the one that comes next.

    The arithmetic of a step stays the stock scheduler's. It runs on one whose table holds only the alpha-bars of
    the grid, in rising time, and which thinks it makes as many steps as it was trained with: so its
    `t - 1000 // 1000` is the neighbour in the grid, and before the first entry comes the final alpha-bar.
    """

    stock_class: Any
    _on_grid: Any = None
    _grid: tuple[float, ...] = ()
    _next_step: int | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Begin a run on the stock grid of `num_inference_steps`, or on `timesteps`.

        Args:
            timesteps: falling numbers between 0 and num_train_timesteps - 1; fractions are allowed.

        Raises:
            ValueError: both or neither is given, or the timesteps are not as above.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps takes num_inference_steps or timesteps, exactly one of them")
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            # at some counts (61, 103, ...) rounding gives the stock trailing grid one timestep too many, -1
            self.timesteps = self.timesteps[:num_inference_steps]
        else:
            self.timesteps = self._checked(timesteps).to(device)
            self.num_inference_steps = len(self.timesteps)
        self._put_on_grid()

    def _checked(self, timesteps: Sequence[float] | Tensor) -> Tensor:
        values = [float(t) for t in timesteps]
        last = self.config.num_train_timesteps - 1
        if not values or not all(math.isfinite(t) and 0 <= t <= last for t in values):
            raise ValueError(f"timesteps must be one or more numbers between 0 and {last}")
        if any(later >= earlier for earlier, later in pairwise(values)):
            raise ValueError("timesteps must fall from one to the next")
        whole = all(t.is_integer() for t in values)  # as the stock grid has them
        return torch.tensor(values, dtype=torch.int64 if whole else torch.float32)

    def _put_on_grid(self) -> None:
        self._grid = tuple(float(t) for t in self.timesteps.tolist())
        self._next_step = None
        self._on_grid = self.stock_class.from_config(self.config)
        self._on_grid.alphas_cumprod = self.alpha_bars(self._grid[::-1])
        self._on_grid.num_inference_steps = self.config.num_train_timesteps

    def alpha_bars(self, timesteps: Sequence[float]) -> Tensor:
        """alpha-bar at any timesteps between 0 and num_train_timesteps - 1, linear between the whole ones."""
        table = self.alphas_cumprod.cpu()
        values = np.interp(timesteps, np.arange(len(table)), table.double().numpy())
        return torch.as_tensor(values).to(table.dtype)

    def _place(self, timestep: float | Tensor) -> int:
        """Where `timestep` stands in the rising table of the stock scheduler."""
        if self._on_grid is None:
            raise ValueError("call set_timesteps before step")
        step = self._step_of(timestep)
        self._next_step = step + 1
        return len(self._grid) - 1 - step

    def _step_of(self, timestep: float | Tensor) -> int:
        """Index of `timestep` in the grid; after the first step of a run a device's timestep is not read."""
        following = self._next_step
        if is_on_device(timestep) and following is not None and following < len(self._grid):
            return following
        value = float(timestep)
        step = min(range(len(self._grid)), key=lambda i: abs(self._grid[i] - value))
        if abs(self._grid[step] - value) > TIMESTEP_TOLERANCE:
            raise ValueError(f"timestep {value:g} is not in the grid that set_timesteps made")
        return step


class AnyGridDDIMScheduler(AnyGrid, CogVideoXDDIMScheduler):
    """CogVideoX's DDIM on any grid of timesteps."""

    stock_class = CogVideoXDDIMScheduler

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From `timestep` to the next of the grid, or to no noise after the last; latents of any shape.

        x' = r x + (sqrt(a') - r sqrt(a)) x0 with r = sqrt((1 - a') / (1 - a)) and, in v-prediction,
        x0 = sqrt(a) x - sqrt(1 - a) v; a, a': alpha-bars of the two timesteps. eta and noise are ignored, as by
        the stock scheduler.
        """
        place = self._place(timestep)
        return self._on_grid.step(model_output, place, sample, return_dict=return_dict)


class AnyGridDPMScheduler(AnyGrid, CogVideoXDPMScheduler):
    """CogVideoX's DPM-Solver++ (second order, stochastic) on any grid of timesteps."""

    stock_class = CogVideoXDPMScheduler

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: float | Tensor,
        timestep_back: float | Tensor | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From `timestep` to the next of the grid with fresh noise; the last step draws none.

        Args:
            old_pred_original_sample: what the step before returned second; None at the first.
            timestep_back: None at the first step; at others it stands for the timestep before in the grid.
        """
        place = self._place(timestep)
        back = None if timestep_back is None else place + 1
        return self._on_grid.step(
            model_output, old_pred_original_sample, place, back, sample, generator=generator, return_dict=return_dict
        )


SCHEDULERS = {"ddim": AnyGridDDIMScheduler, "dpm": AnyGridDPMScheduler}


def is_on_device(timestep: float | Tensor) -> bool:
    """Whether reading a timestep would wait for a device."""
    return isinstance(timestep, Tensor) and timestep.device.type != "cpu"


def any_grid_scheduler(solver: str, config: Any) -> AnyGridDDIMScheduler | AnyGridDPMScheduler:
    """The scheduler for SOLVER with the settings of a pipeline's own, which both share."""
    return SCHEDULERS[solver].from_config(config)
