"""Flow matching on cached latents, with classifier-free guidance, and its distillation into an embedding.

Convention of FLUX and Wan: x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny_training.loop import Stage

CAPTION_DROPOUT = 0.12
GUIDANCE_RANGE = (1.0, 6.0)

# velocity(model, latents, sigma, token ids, guidance or None) -> velocity: the one thing that models differ in
Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Batches:
    """Latents (n, ...) with token ids (n, captions, T); `draw` is a function of the step alone."""

    def __init__(self, latents: Tensor, tokens: Tensor, empty: Tensor, batch_size: int, device: str):
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.batch_size, self.device = batch_size, device

    def draw(self, step: int, drop_captions: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, token ids, noise and sigma of one batch."""
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(self.latents), (self.batch_size,), generator=generator)
        which = torch.randint(self.tokens.shape[1], (self.batch_size,), generator=generator)
        latents = self.latents[chosen].float()
        tokens = self.tokens[chosen, which]
        if drop_captions:
            dropped = torch.rand(self.batch_size, generator=generator) < CAPTION_DROPOUT
            tokens = torch.where(dropped[:, None], self.empty, tokens)
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(self.batch_size, generator=generator) + 0.2)
        uniform = torch.rand(self.batch_size, generator=generator)
        # a tenth uniform, so that both ends of the range are trained too
        sigma = torch.where(uniform < 0.1, uniform * 10, sigma)
        return tuple(t.to(self.device) for t in (latents, tokens, noise, sigma))


def _mix(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def train_flow(
    model: nn.Module, velocity: Velocity, batches: Batches, *, num_steps: int, learning_rate: float, folder: Path
) -> nn.Module:
    """Train `model` to predict the velocity, some captions dropped, and return it with averaged weights."""
    model.to(batches.device)
    compiled = torch.compile(model)

    def loss(step: int) -> Tensor:
        latents, tokens, noise, sigma = batches.draw(step, drop_captions=True)
        with torch.autocast(batches.device, torch.bfloat16):
            predicted = velocity(compiled, _mix(latents, noise, sigma), sigma, tokens, None)
        return (predicted.float() - (noise - latents)).square().mean()

    return Stage("flow", model, loss, num_steps, learning_rate, folder, muon=True).run()


def distil_guidance(
    teacher: nn.Module,
    student: nn.Module,
    velocity: Velocity,
    batches: Batches,
    *,
    num_steps: int,
    learning_rate: float,
    folder: Path,
) -> nn.Module:
    """Teach `student`, which takes the guidance scale, the teacher's guided velocity u + w (c - u)."""
    teacher.to(batches.device).requires_grad_(False)
    student.to(batches.device)
    ask, answer = torch.compile(teacher), torch.compile(student)

    def loss(step: int) -> Tensor:
        latents, tokens, noise, sigma = batches.draw(step, drop_captions=False)
        generator = torch.Generator().manual_seed(step)
        low, high = GUIDANCE_RANGE
        guidance = (low + (high - low) * torch.rand(len(latents), generator=generator)).to(batches.device)
        mixed = _mix(latents, noise, sigma)
        with torch.autocast(batches.device, torch.bfloat16):
            with torch.no_grad():
                empty = batches.empty.to(batches.device).expand_as(tokens)
                both = velocity(
                    ask, mixed.repeat(2, *[1] * (mixed.ndim - 1)), sigma.repeat(2), torch.cat([empty, tokens]), None
                ).float()
                without, conditional = both.chunk(2)
                weight = guidance.view(-1, *[1] * (mixed.ndim - 1))
                target = without + weight * (conditional - without)
            predicted = velocity(answer, mixed, sigma, tokens, guidance)
        return (predicted.float() - target).square().mean()

    return Stage("distil", student, loss, num_steps, learning_rate, folder, muon=True).run()
