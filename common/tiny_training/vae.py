"""Trains a small image autoencoder (any diffusers VAE with `encode` and `decode`) on rendered scenes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_training.loop import Stage
from tiny_training.precision import autocast

KL_WEIGHT = 2e-4  # makes the latents noisy by a twentieth, so that the decoder forgives a generator as much
EDGE_WEIGHT = 0.5
SQUARE_WEIGHT = 4.0


@torch.no_grad()
def finished_vae(fresh: Any, folder: Path, *shape: int, seen_as: Callable[[Any], Any] = lambda vae: vae) -> Any:
    """The autoencoder in `folder`. Raises SystemExit where its latents have another shape than those of `fresh`.

    Args:
        fresh: a new one, of which tiny_parts.py knows the latents.
        shape: of the pixels that both are asked for.
        seen_as: gives an autoencoder diffusers' `encode`.
    """
    found = type(fresh).from_pretrained(folder, dtype=torch.float32)
    given, wanted = (tuple(seen_as(vae).encode(torch.zeros(shape)).latent_dist.mean.shape) for vae in (found, fresh))
    if given != wanted:
        raise SystemExit(
            f"{folder} makes latents {given}, and the transformer is for {wanted}: leave --vae out to train one"
        )
    return found


def reconstruction_loss(picture: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on their horizontal and vertical differences (..., H, W), which keeps edges sharp, and squares.

    Without the squares an axis of colour is left out for long.
    """
    error = picture - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges + SQUARE_WEIGHT * error.square().mean()


def to_tensor(pixels: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 (n, H, W, 3) -> float (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(
    vae: nn.Module,
    pixels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    folder: Path,
    device: str = "cpu",
) -> nn.Module:
    """Train on `pixels`, uint8 (n, H, W, 3), and return the VAE with averaged weights."""
    vae = vae.to(device)

    # eager: the compiled backward pass of torch 2.13 on a CPU does not train this model
    def loss(step: int) -> Tensor:
        chosen = np.random.default_rng((17, step)).integers(0, len(pixels), batch_size)
        target = to_tensor(pixels[chosen], device)
        with autocast(device):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step)).to(device)
            picture = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return reconstruction_loss(picture.float(), target) + KL_WEIGHT * kl

    return Stage("vae", vae, loss, num_steps, learning_rate, folder, muon=True).run()


@torch.no_grad()
def encode_all(vae: nn.Module, pixels: np.ndarray, device: str = "cpu", batch_size: int = 64) -> Tensor:
    """Posterior means of `pixels`, uint8 (n, H, W, 3), unscaled, as float16 (n, C, h, w)."""
    parts = []
    for start in range(0, len(pixels), batch_size):
        batch = to_tensor(pixels[start : start + batch_size], device)
        with autocast(device):
            parts.append(vae.encode(batch).latent_dist.mean.half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, pixels: np.ndarray, device: str = "cpu") -> float:
    """Mean PSNR in dB of pictures that went through the autoencoder."""
    target = to_tensor(pixels, device)
    picture = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
    mse = F.mse_loss(picture, target, reduction="none").mean((1, 2, 3)) / 4
    return float((-10 * mse.log10()).mean())
