"""Trains the autoencoder of the tiny Open-Sora pipeline; the real one too has a picture autoencoder made elsewhere.

The picture part is that of the tiny FLUX pipeline, which was trained on pictures of the same kind. The temporal part
learns from what it makes of clips, a sixteenth as many numbers a frame as the pixels' places.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from opensora12 import OpenSoraVAE
from torch import Tensor

from tiny_training.arrays import filled_array
from tiny_training.loop import Stage
from tiny_training.precision import autocast
from tiny_training.vae import KL_WEIGHT
from tiny_training.video_vae import Crops, draw_crops, to_tensor

CROPS = Crops(1.0, 17, 8, 16)  # of latents; the last steps see whole frames, since group norms do
WHOLE_FROM, WHOLE_COUNT = 0.85, 4
LEARNING_RATE = 3e-3


def load_picture_part(autoencoder: OpenSoraVAE, folder: Path) -> None:
    """Copy the weights of the tiny FLUX pipeline's picture autoencoder, which is of the same shape.

    Raises:
        SystemExit: it is not trained yet.
    """
    if not folder.exists():
        raise SystemExit(f"no picture autoencoder in {folder}: train the tiny FLUX pipeline, or give --picture-vae")
    trained = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    autoencoder.spatial_vae.module.load_state_dict(trained.state_dict())


def encoded_frames(autoencoder: OpenSoraVAE, pixels: np.ndarray, path: Path, device: str, batch: int) -> np.ndarray:
    """What the picture part makes of each frame, float16 (n, F, h, w, C), kept at `path`; resumable."""

    @torch.no_grad()
    def fill(start: int, stop: int) -> np.ndarray:
        with autocast(device):
            frames = autoencoder.spatial_vae.encode(to_tensor(pixels[start:stop], device), None, sample=False)
        return frames.permute(0, 2, 3, 4, 1).half().cpu().numpy()

    return filled_array(path, (len(pixels), *fill(0, 1).shape[1:]), "float16", fill, batch)


def train_temporal_part(
    autoencoder: OpenSoraVAE, frames: np.ndarray, *, num_steps: int, batch_factor: int, folder: Path, device: str
) -> None:
    """Train the temporal part in place on `frames`, (n, F, h, w, C) as `encoded_frames` makes them."""
    scale = float(np.asarray(frames[:100], dtype=np.float32).std())

    def loss(step: int) -> Tensor:
        crops = CROPS if step < WHOLE_FROM * num_steps else Crops(1.0, CROPS.frames, frames.shape[2], WHOLE_COUNT)
        crops = replace(crops, count=crops.count * batch_factor)
        target = torch.from_numpy(draw_crops(frames, crops, step)).to(device).permute(0, 4, 1, 2, 3).float()
        with autocast(device):
            posterior = autoencoder.temporal_vae.encode(target)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step)).to(device)
            made = autoencoder.temporal_vae.decode(mean + (0.5 * logvar).exp() * noise, crops.frames)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = (made.float() - target) / scale
        return error.abs().mean() + KL_WEIGHT * kl

    part = autoencoder.temporal_vae.to(device)
    Stage("vae-temporal", part, loss, num_steps, LEARNING_RATE, folder, muon=True).run()


@torch.no_grad()
def encoded_latents(autoencoder: OpenSoraVAE, frames: np.ndarray, device: str, batch: int = 32) -> np.ndarray:
    """Posterior means of clips of encoded frames (n, F, h, w, C), unscaled, float16 (n, C, f, h, w)."""
    encode: Callable = autoencoder.temporal_vae.encode
    parts = []
    for part in np.array_split(frames, math.ceil(len(frames) / batch)):
        latents = torch.from_numpy(np.ascontiguousarray(part)).to(device).permute(0, 4, 1, 2, 3).float()
        with autocast(device):
            parts.append(encode(latents).mean.half().cpu().numpy())
    return np.concatenate(parts)
