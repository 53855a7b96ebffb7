"""The autoencoder of Open-Sora 1.2: a picture autoencoder frame by frame, then a temporal one.

Source: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0); keys of the state dict are those of
hpcai-tech/OpenSora-VAE-v1.2. Pixels are in [-1, 1].
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from .checkpoint import OfficialLayout
from .vae_temporal import TemporalVAE

__all__ = ["SPATIAL_SCALE", "OpenSoraVAE", "SpatialVAE", "TemporalVAE"]

SPATIAL_SCALE = 0.18215  # fixed in the original, whatever scaling_factor the picture autoencoder's config says
# diffusers' AutoencoderKL in the shape of SDXL's, of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers
SDXL_SHAPE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SHIFT = (-0.10, 0.34, 0.27, 0.98)  # mean and spread of the temporal latents, by channel
SCALE = (3.85, 2.32, 2.33, 3.06)
MICRO_FRAMES = 17


class SpatialVAE(nn.Module):
    """A picture autoencoder on the frames of a video, a few at a time."""

    def __init__(self, config: dict[str, Any], micro_batch_size: int | None):
        super().__init__()
        self.module = AutoencoderKL.from_config(dict(config))
        self.micro_batch_size = micro_batch_size

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    def encode(self, video: Tensor, generator: torch.Generator | None, sample: bool) -> Tensor:
        """[B, 3, T, height, width] -> [B, C, T, H, W], scaled."""

        def one(frames: Tensor) -> Tensor:
            posterior = self.module.encode(frames).latent_dist
            return (posterior.sample(generator) if sample else posterior.mode()) * SPATIAL_SCALE

        return self._by_frames(one, video)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, 3, T, height, width]."""
        return self._by_frames(lambda frames: self.module.decode(frames / SPATIAL_SCALE).sample, latents)

    def _by_frames(self, function: Any, video: Tensor) -> Tensor:
        frames = video.transpose(1, 2).flatten(0, 1)  # [B T, C, H, W]
        parts = [function(part) for part in frames.split(self.micro_batch_size or len(frames))]
        return torch.cat(parts).unflatten(0, (video.shape[0], -1)).transpose(1, 2)


class OpenSoraVAE(OfficialLayout, ModelMixin, ConfigMixin):
    """Videos to latents and back; a picture is a video of one frame.

    Args:
        spatial_config: of diffusers' AutoencoderKL; None for the released shape.
        temporal_config: of `TemporalVAE`; None for the released shape.
        micro_frame_size: frames that the temporal part takes at a time, each chunk on its own; None for all.
        micro_batch_size: frames that the spatial part takes at a time; a matter of memory only.
        shift, scale: latents are (z - shift) / scale, by channel.
    """

    official: ClassVar[dict[str, Any]] = {"micro_frame_size": MICRO_FRAMES, "shift": SHIFT, "scale": SCALE}
    use_slicing = False  # one video at a time, so that a batch needs no more memory than one

    @register_to_config
    def __init__(
        self,
        spatial_config: dict[str, Any] | None = None,
        temporal_config: dict[str, Any] | None = None,
        micro_frame_size: int | None = MICRO_FRAMES,
        micro_batch_size: int | None = 4,
        shift: tuple[float, ...] = SHIFT,
        scale: tuple[float, ...] = SCALE,
    ):
        super().__init__()
        self.spatial_vae = SpatialVAE(spatial_config or SDXL_SHAPE, micro_batch_size)
        self.temporal_vae = TemporalVAE.from_config(dict(temporal_config or {}))
        # not register_buffer, which refuses names that the class has already; see the properties
        self._buffers["shift"] = torch.tensor(shift)[None, :, None, None, None]
        self._buffers["scale"] = torch.tensor(scale)[None, :, None, None, None]

    @property
    def shift(self) -> Tensor:
        """[1, C, 1, 1, 1]; a property, since diffusers would find the configuration's entry of that name first."""
        return self._buffers["shift"]

    @property
    def scale(self) -> Tensor:
        """[1, C, 1, 1, 1]"""
        return self._buffers["scale"]

    @property
    def latent_channels(self) -> int:
        return self.temporal_vae.config.embed_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent."""
        return self.spatial_vae.factor

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a video of that many frames and pixels.

        Every chunk of micro_frame_size frames is rounded up on its own; rows and columns are rounded down.
        """
        rows, columns = height // self.spatial_factor, width // self.spatial_factor
        latent_frames = sum(self.temporal_vae.latent_frames(n) for n in self._chunks(frames))
        return latent_frames, rows, columns

    @apply_forward_hook
    def encode(self, video: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True) -> Tensor:
        """Latents of a video.

        Args:
            video: pixels [B, 3, frames, height, width] in [-1, 1].
            generator: draws both posteriors' noise; the host's default one if None.
            sample_posterior: False takes the mean of both posteriors.

        Returns:
            [B, 4, *latent_size].
        """
        if self.use_slicing and len(video) > 1:
            return torch.cat([self.encode(one, generator, sample_posterior) for one in video.split(1)])
        generator = torch.default_generator if generator is None else generator
        frames = self.spatial_vae.encode(video, generator, sample_posterior)
        parts = []
        for chunk in frames.split(list(self._chunks(frames.shape[2])), dim=2):
            posterior = self.temporal_vae.encode(chunk)
            parts.append(posterior.sample(generator) if sample_posterior else posterior.mode())
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    @apply_forward_hook
    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Pixels of latents, about [-1, 1] and not clamped.

        Args:
            latents: [B, 4, latent frames, rows, columns].
            num_frames: frames to make; latent_size says how many latent frames they need.

        Returns:
            [B, 3, num_frames, height, width].

        Raises:
            ValueError: the latents hold another number of frames.
        """
        if self.use_slicing and len(latents) > 1:
            return torch.cat([self.decode(one, num_frames) for one in latents.split(1)])
        chunks = list(self._chunks(num_frames))
        sizes = [self.temporal_vae.latent_frames(n) for n in chunks]
        if sum(sizes) != latents.shape[2]:
            raise ValueError(f"{num_frames} frames need {sum(sizes)} latent frames, these have {latents.shape[2]}")
        z = latents * self.scale.to(latents.dtype) + self.shift.to(latents.dtype)
        parts = [self.temporal_vae.decode(part, n) for part, n in zip(z.split(sizes, dim=2), chunks, strict=True)]
        return self.spatial_vae.decode(torch.cat(parts, dim=2))

    def _chunks(self, frames: int) -> Iterator[int]:
        """Sizes of the chunks that the temporal part sees."""
        size = self.config.micro_frame_size or frames
        for start in range(0, frames, size):
            yield min(size, frames - start)
