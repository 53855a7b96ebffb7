"""A pipeline small enough to know every number of it: diffusers' loop around a velocity in closed form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ertacache.cache import Coefficients
from ertacache.calibration import calibration_fields

Velocity = Callable[[Tensor, Tensor], Tensor]


class ToyTransformer(nn.Module):
    """velocity(latents, sigma); counts its calls."""

    def __init__(self, velocity: Velocity):
        super().__init__()
        self.velocity = velocity
        self.weight = nn.Parameter(torch.ones(4))
        self.calls = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.calls += 1
        sigma = (timestep / 1000).view(-1, *[1] * (hidden_states.ndim - 1))
        return (self.velocity(hidden_states, sigma).to(hidden_states.dtype),)


class ToyPipeline:
    """Latents (n, 3, side, side); with guidance it calls the transformer twice a step, as Wan does."""

    def __init__(self, velocity: Velocity, scheduler=None, guidance_scale: float = 1.0, side: int = 4):
        self.transformer = ToyTransformer(velocity)
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.guidance_scale = guidance_scale
        self.side = side
        self.interrupt_at: int | None = None

    def set_progress_bar_config(self, **_) -> None:
        pass

    def __call__(self, prompt, generator=None, num_inference_steps: int = 8, output_type: str = "pt", latents=None):
        count = 1 if isinstance(prompt, str) else len(prompt)
        if latents is None:
            generators = generator if isinstance(generator, list) else [generator] * count
            latents = torch.stack([torch.randn(3, self.side, self.side, generator=g) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            if step == self.interrupt_at:
                raise KeyboardInterrupt
            timestep = t.expand(count)
            output = self.transformer(hidden_states=latents, timestep=timestep, return_dict=False)[0]
            if self.guidance_scale > 1:
                without = self.transformer(hidden_states=latents, timestep=timestep, return_dict=False)[0] * 0.5
                output = without + self.guidance_scale * (output - without)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents if output_type == "latent" else latents.sigmoid(),)


def flow_solver(kind: type, **settings: Any) -> Any:
    """A multistep solver on flow sigmas; the test skips where diffusers is older than those."""
    try:
        return kind(prediction_type="flow_prediction", use_flow_sigmas=True, **settings)
    except TypeError:
        pytest.skip("this diffusers has no flow sigmas")


def plain_fields(steps: int) -> dict:
    """Fields of a calibration that takes the newest output as it is at every step."""
    return calibration_fields(Coefficients.of_outputs([[1.0]] * steps))


def linear_in_sigma(latents: Tensor, sigma: Tensor) -> Tensor:
    """A velocity that depends on sigma alone: reusing it is wrong by exactly the difference in sigma."""
    return sigma.expand_as(latents).clone()


def curved(latents: Tensor, sigma: Tensor) -> Tensor:
    """A velocity that bends with the state and the noise level."""
    return torch.tanh(latents) * (0.5 + sigma) + torch.sin(3 * sigma)
