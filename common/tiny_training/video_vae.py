"""Trains a small video autoencoder (Wan's or CogVideoX's) on rendered clips, and encodes the clips.

Training goes through phases: single frames, then small crops of many clips, at the end whole clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tiny_training.arrays import filled_array
from tiny_training.loop import Stage
from tiny_training.precision import autocast
from tiny_training.vae import KL_WEIGHT, reconstruction_loss


@dataclass(frozen=True)
class Crops:
    """`count` crops of `frames` frames and `side` x `side` pixels a step, up to the fraction `until` of training."""

    until: float
    frames: int
    side: int
    count: int


def to_tensor(pixels: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 (n, F, H, W, 3) -> float (n, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def set_memory_format(module: nn.Module, channels_last: bool) -> None:
    """Lay convolution weights out with the channels last (faster on CPUs) or in the order that files need."""
    for parameter in module.parameters():
        if parameter.ndim in (4, 5):
            last = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
            layout = last if channels_last else torch.contiguous_format
            parameter.data = parameter.data.contiguous(memory_format=layout)


def draw_crops(pixels: np.ndarray, crops: Crops, step: int) -> np.ndarray:
    """uint8 (count, frames, side, side, 3), a function of the step alone."""
    rng = np.random.default_rng((23, step))
    clips, total, height, width, _ = pixels.shape
    # every crop starts anywhere in time: to the autoencoder the first frame of a crop is the first of a clip
    starts = rng.integers(
        0, (clips, total - crops.frames + 1, height - crops.side + 1, width - crops.side + 1), (crops.count, 4)
    )
    return np.stack([pixels[i, t : t + crops.frames, y : y + crops.side, x : x + crops.side] for i, t, y, x in starts])


def train_video_vae(
    vae: nn.Module,
    pixels: np.ndarray,
    phases: Sequence[Crops],
    *,
    num_steps: int,
    learning_rate: float,
    folder: Path,
    device: str = "cpu",
) -> nn.Module:
    """Train on crops of `pixels`, uint8 (n, F, H, W, 3), and return the autoencoder with averaged weights."""
    vae = vae.to(device)
    set_memory_format(vae, channels_last=True)

    def loss(step: int) -> Tensor:
        crops = next(c for c in phases if step < c.until * num_steps)
        target = to_tensor(draw_crops(pixels, crops, step), device)
        with autocast(device):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step)).to(device)
            clip = vae.decode(mean + (0.5 * logvar).exp() * noise).sample
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(clip.float(), target) + KL_WEIGHT * kl

    Stage("vae", vae, loss, num_steps, learning_rate, folder, muon=True).run()
    set_memory_format(vae, channels_last=False)
    return vae


@torch.no_grad()
def encoded_clips(
    vae: nn.Module, pixels: np.ndarray, path: Path, device: str = "cpu", batch_size: int = 8
) -> np.ndarray:
    """Posterior means of `pixels`, uint8 (n, F, H, W, 3), as float16 (n, C, f, h, w), mapped from `path`; resumable."""

    @torch.no_grad()
    def fill(start: int, stop: int) -> np.ndarray:
        with autocast(device):
            return vae.encode(to_tensor(pixels[start:stop], device)).latent_dist.mean.half().cpu().numpy()

    shape = fill(0, 1).shape[1:]
    return filled_array(path, (len(pixels), *shape), "float16", fill, batch_size)


@torch.no_grad()
def clip_psnr(vae: nn.Module, pixels: np.ndarray, device: str = "cpu", batch_size: int = 8) -> float:
    """Mean over clips, uint8 (n, F, H, W, 3), of the PSNR in dB of what comes out of the autoencoder."""
    values = []
    for start in range(0, len(pixels), batch_size):
        target = to_tensor(pixels[start : start + batch_size], device)
        clip = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * ((clip - target).square().mean((1, 2, 3, 4)) / 4).log10())
    return float(torch.cat(values).mean())
