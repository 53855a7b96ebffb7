"""Denoising on cached latents, with classifier-free guidance, and its distillation into an embedding.

FLUX and Wan: x = (1 - sigma) x_0 + sigma noise, the model says the velocity noise - x_0. CogVideoX: x =
sqrt(a) x_0 + sqrt(1 - a) noise, the model says v = sqrt(a) noise - sqrt(1 - a) x_0. Both are a `NoisePath`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiny_training.loop import Stage
from tiny_training.precision import autocast
from tiny_training.text import UNKNOWN_ID

CAPTION_DROPOUT = 0.12
WORD_DROPOUT = 0.03  # replaced by the unknown word, so that it means nothing in particular
GUIDANCE_RANGE = (1.0, 6.0)

# velocity(transformer, latents, level, token ids, guidance or None) -> its output: the one thing that models differ in
Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]
# path(clean latents, noise, level (B,) in [0, 1]) -> (noisy latents, what the model should say)
NoisePath = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# levels(count, generator) -> noise levels (count,) in [0, 1] to train at
Levels = Callable[[int, torch.Generator], Tensor]


def logit_normal_levels(count: int, generator: torch.Generator, mean: float = 0.4) -> Tensor:
    """Levels whose logit is normal around `mean`; adding log(s) to the mean is a shift by s of the noise grid."""
    where: dict[str, Any] = {"generator": generator, "device": generator.device}
    levels = torch.sigmoid(torch.randn(count, **where) + mean)
    uniform = torch.rand(count, **where)
    # a tenth uniform, so that both ends of the range are trained too
    return torch.where(uniform < 0.1, uniform * 10, levels)


def uniform_levels(count: int, generator: torch.Generator) -> Tensor:
    """Levels spread evenly over [0, 1)."""
    return torch.rand(count, generator=generator, device=generator.device)


def straight_path(latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Flow matching: (1 - sigma) x_0 + sigma noise, and the velocity noise - x_0."""
    level = level.view(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise, noise - latents


def diffusion_path(alphas_cumprod: Tensor) -> NoisePath:
    """v-prediction (Salimans and Ho 2022) on a noise schedule (T,); a level u stands for timestep floor(u T)."""

    def path(latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        alpha = alphas_cumprod.float().to(level.device)[timesteps_of(level, len(alphas_cumprod))]
        alpha = alpha.view(-1, *[1] * (latents.ndim - 1))
        keep, add = alpha.sqrt(), (1 - alpha).sqrt()
        return keep * latents + add * noise, keep * noise - add * latents

    return path


def timesteps_of(level: Tensor, count: int) -> Tensor:
    """Levels in [0, 1] as int64 timesteps 0 to count - 1."""
    return (level * count).long().clamp(max=count - 1)


class Batches:
    """Latents (n, ...) with token ids (n, captions, T), on `device`; `draw` is a function of the step alone."""

    def __init__(
        self,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        batch_size: int,
        device: str,
        levels: Levels = logit_normal_levels,
    ):
        self.latents, self.tokens, self.empty = (t.to(device) for t in (latents, tokens, empty))
        self.batch_size, self.device, self.levels = batch_size, device, levels

    def draw(self, step: int, drop_captions: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, token ids, noise and noise level of one batch."""
        generator = torch.Generator(self.device).manual_seed(step)
        where: dict[str, Any] = {"generator": generator, "device": self.device}
        chosen = torch.randint(len(self.latents), (self.batch_size,), **where)
        which = torch.randint(self.tokens.shape[1], (self.batch_size,), **where)
        latents, tokens = self.latents[chosen].float(), self.tokens[chosen, which]
        if drop_captions:
            unread = (torch.rand(tokens.shape, **where) < WORD_DROPOUT) & (tokens > UNKNOWN_ID)
            tokens = tokens.masked_fill(unread, UNKNOWN_ID)
            dropped = torch.rand(self.batch_size, **where) < CAPTION_DROPOUT
            tokens = torch.where(dropped[:, None], self.empty, tokens)
        noise = torch.randn(latents.shape, **where)
        return latents, tokens, noise, self.levels(self.batch_size, generator)


def _compiled_loss(loss: Callable[..., Tensor], models: tuple[nn.Module, ...], device: str) -> Callable[[int], Tensor]:
    """`loss(*models, step)` of compiled models as a function of the step; of plain ones where compiling fails.

    Compiling takes minutes on a CPU, and saves no time there.
    """
    if device == "cpu":
        return partial(loss, *models)
    torch.set_float32_matmul_precision("high")
    # static shapes: a later stage with more frames would otherwise be compiled for any number of them, and slower
    compiled = partial(loss, *(torch.compile(model, dynamic=False) for model in models))
    try:
        compiled(0).backward()
    except Exception as problem:  # whatever the compiler lacks on this machine
        print(f"not compiled: {type(problem).__name__}: {str(problem)[:200]}")
        compiled = partial(loss, *models)
    for model in models:
        model.zero_grad(set_to_none=True)
    return compiled


def train_flow(
    parts: nn.ModuleDict,
    velocity: Velocity,
    batches: Batches,
    *,
    num_steps: int,
    learning_rate: float,
    folder: Path,
    name: str,
    path: NoisePath = straight_path,
    until: float | None = None,
) -> None:
    """Train `parts` in place to say what `path` asks for, some captions dropped; they end with averaged weights.

    Args:
        parts: `transformer` and the text encoders that `velocity` calls.
        until: when to end in place of `num_steps`; see `Stage`.
    """
    parts.to(batches.device).train()

    def loss(ask: nn.Module, step: int) -> Tensor:
        latents, tokens, noise, level = batches.draw(step, drop_captions=True)
        mixed, target = path(latents, noise, level)
        with autocast(batches.device):
            predicted = velocity(ask, mixed, level, tokens, None)
        return (predicted.float() - target).square().mean()

    ready = _compiled_loss(loss, (parts["transformer"],), batches.device)
    parts.zero_grad(set_to_none=True)
    Stage(name, parts, ready, num_steps, learning_rate, folder, muon=True, until=until).run()


def distil_guidance(
    teacher: nn.Module,
    student: nn.Module,
    velocity: Velocity,
    batches: Batches,
    *,
    num_steps: int,
    learning_rate: float,
    folder: Path,
    strength: float = 1.0,
    until: float | None = None,
) -> nn.Module:
    """Teach `student`, which takes a guidance scale g, the teacher's u + w (c - u) with w = 1 + strength (g - 1).

    The text encoders that `velocity` calls stay as they are, if their weights ask for no gradient.
    """
    teacher.to(batches.device).requires_grad_(False)
    student.to(batches.device)

    def loss(ask: nn.Module, answer: nn.Module, step: int) -> Tensor:
        latents, tokens, noise, sigma = batches.draw(step, drop_captions=False)
        low, high = GUIDANCE_RANGE
        chances = torch.rand(len(latents), generator=torch.Generator().manual_seed(step))
        guidance = (low + (high - low) * chances).to(batches.device)
        mixed, _ = straight_path(latents, noise, sigma)
        with autocast(batches.device):
            with torch.no_grad():
                empty = batches.empty.expand_as(tokens)
                both = velocity(
                    ask, mixed.repeat(2, *[1] * (mixed.ndim - 1)), sigma.repeat(2), torch.cat([empty, tokens]), None
                ).float()
                without, conditional = both.chunk(2)
                weight = (1 + strength * (guidance - 1)).view(-1, *[1] * (mixed.ndim - 1))
                target = without + weight * (conditional - without)
            predicted = velocity(answer, mixed, sigma, tokens, guidance)
        return (predicted.float() - target).square().mean()

    ready = _compiled_loss(loss, (teacher, student), batches.device)
    return Stage("distil", student, ready, num_steps, learning_rate, folder, muon=True, until=until).run()
