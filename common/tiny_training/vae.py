"""Trains a small image autoencoder (any diffusers VAE with `encode` and `decode`) on rendered scenes."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_training.loop import Stage
from tiny_training.precision import autocast

KL_WEIGHT = 1e-5
EDGE_WEIGHT = 0.5


def reconstruction_loss(picture: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on their horizontal and vertical differences (..., H, W), which keeps edges sharp."""
    error = picture - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


class _Autoencode(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        return self.vae.decode(latents).sample, kl.mean()


def train_vae(
    vae: nn.Module,
    pixels: np.ndarray,
    latent_channels: int,
    factor: int,
    *,
    num_steps: int,
    batch_size: int,
    crop: int,
    learning_rate: float,
    folder: Path,
    device: str = "cpu",
) -> nn.Module:
    """Train on random crops of `pixels`, uint8 (n, H, W, 3), and return the VAE with averaged weights."""
    vae = vae.to(device)
    # eager: the compiled backward pass of torch 2.13 on a CPU does not train this model
    autoencode = _Autoencode(vae)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((17, step))
        # the last fifth on whole pictures, since the middle block attends over the whole of what it sees
        whole = step > 0.8 * num_steps
        side = pixels.shape[1] if whole else crop
        count = max(4, batch_size * crop**2 // side**2)
        corners = rng.integers(0, pixels.shape[1] - side + 1, (count, 2))
        chosen = rng.integers(0, len(pixels), count)
        batch = np.stack([pixels[i, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners, strict=True)])
        target = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.randn(
            count, latent_channels, side // factor, side // factor, generator=torch.Generator().manual_seed(step)
        ).to(device)
        with autocast(device):
            picture, kl = autoencode(target, noise)
        return reconstruction_loss(picture.float(), target) + KL_WEIGHT * kl.float()

    stage = Stage("vae", vae, loss, num_steps, learning_rate, folder)
    return stage.run()


@torch.no_grad()
def encode_all(vae: nn.Module, pixels: np.ndarray, device: str = "cpu", batch_size: int = 64) -> Tensor:
    """Posterior means of `pixels`, uint8 (n, H, W, 3), unscaled, as float16 (n, C, h, w)."""
    parts = []
    for start in range(0, len(pixels), batch_size):
        batch = torch.from_numpy(pixels[start : start + batch_size]).to(device)
        batch = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(device):
            parts.append(vae.encode(batch).latent_dist.mean.half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, pixels: np.ndarray, device: str = "cpu") -> float:
    """Mean PSNR in dB of pictures that went through the autoencoder."""
    target = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    picture = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
    mse = F.mse_loss(picture, target, reduction="none").mean((1, 2, 3)) / 4
    return float((-10 * mse.log10()).mean())
