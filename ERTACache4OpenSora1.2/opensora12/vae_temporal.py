"""The temporal autoencoder of Open-Sora 1.2: causal 3D convolutions, four frames to one, space untouched.

Source: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0), after MAGVIT-v2's tokenizer; keys of the state dict are
those of hpcai-tech/OpenSora-VAE-v1.2. Shapes: B samples, C channels, T frames, H rows, W columns.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn


class CausalConv3d(nn.Module):
    """A convolution whose output frame sees no later input frame; stride in time only."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, bias: bool = True):
        super().__init__()
        side, front = kernel // 2, kernel - stride  # a strided kernel needs one frame less in front
        self.padding = (side, side, side, side, max(front, 0), 0)
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = CausalConv3d(channels, out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out)
        self.conv2 = CausalConv3d(out, out, 3, bias=False)
        if channels != out:
            self.conv3 = CausalConv3d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.conv3(x) if hasattr(self, "conv3") else x)


def residual_blocks(channels: int, out: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(channels if i == 0 else out, out, groups) for i in range(count))


def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Encoder(nn.Module):
    """[B, in, T, H, W] -> [B, out, T / time factor, H, W]."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], shrinks: Sequence[bool], count: int, groups: int
    ):
        super().__init__()
        self.conv_in = CausalConv3d(channels, widths[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            residual_blocks(widths[max(level - 1, 0)], width, count, groups) for level, width in enumerate(widths)
        )
        # indexed by level, as in the checkpoint, whether the level shrinks or not
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride=2) if shrink else nn.Identity()
            for width, shrink in zip(widths, shrinks, strict=False)
        )
        self.res_blocks = residual_blocks(widths[-1], widths[-1], count, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = run(blocks, x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(F.silu(self.norm1(run(self.res_blocks, x))))


class Decoder(nn.Module):
    """[B, latent, T, H, W] -> [B, out, T x time factor, H, W]."""

    def __init__(self, latent: int, out: int, widths: Sequence[int], grows: Sequence[bool], count: int, groups: int):
        super().__init__()
        self.conv1 = CausalConv3d(latent, widths[-1], 3)
        self.res_blocks = residual_blocks(widths[-1], widths[-1], count, groups)
        incoming = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            residual_blocks(before, width, count, groups) for before, width in zip(incoming, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if grow else nn.Identity()
            for width, grow in zip(widths[1:], grows, strict=False)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], out, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = run(self.res_blocks, self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = run(self.block_res_blocks[level], x)
            if level > 0 and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                x = channels_to_frames(self.conv_blocks[level - 1](x))
        return self.conv_out(F.silu(self.norm1(x)))


def channels_to_frames(x: Tensor) -> Tensor:
    """[B, 2 C, T, H, W] -> [B, C, 2 T, H, W]: channel 2c + r of frame t becomes channel c of frame 2t + r."""
    return x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


class TemporalVAE(ModelMixin, ConfigMixin):
    """Autoencoder along time of what the spatial autoencoder makes.

    Args:
        in_out_channels: channels of what is encoded.
        latent_embed_dim, embed_dim: latent channels inside and outside the quantisation convolutions.
        filters, channel_multipliers: width of level i is filters x channel_multipliers[i].
        num_res_blocks: a level's residual blocks.
        temporal_downsample: whether the step from level i to i + 1 halves the frames.
        num_groups: of the group norms.
    """

    @register_to_config
    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_groups: int = 32,
        activation_fn: str = "swish",
    ):
        super().__init__()
        if activation_fn != "swish":
            raise ValueError(f"activation_fn {activation_fn!r} is not known; the temporal VAE has 'swish'")
        widths = [filters * multiplier for multiplier in channel_multipliers]
        if len(temporal_downsample) != len(widths) - 1:
            raise ValueError(f"temporal_downsample needs {len(widths) - 1} entries for {len(widths)} levels")
        levels = (widths, temporal_downsample, num_res_blocks, num_groups)
        self.encoder = Encoder(in_out_channels, 2 * latent_embed_dim, *levels)
        self.decoder = Decoder(latent_embed_dim, in_out_channels, *levels)
        self.quant_conv = CausalConv3d(2 * latent_embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = CausalConv3d(embed_dim, latent_embed_dim, 1)
        self.time_factor = 2 ** sum(map(bool, temporal_downsample))

    def latent_frames(self, frames: int) -> int:
        """Latent frames of one chunk of `frames` frames."""
        return -(-frames // self.time_factor)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """[B, C, T, H, W] -> the posterior of [B, embed_dim, ceil(T / 4), H, W]; log-variance in [-30, 20]."""
        front = (-x.shape[2]) % self.time_factor
        moments = self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, front, 0))))
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """[B, embed_dim, T, H, W] -> [B, C, num_frames, H, W].

        Raises:
            ValueError: `num_frames` does not belong to T latent frames.
        """
        needed = self.latent_frames(num_frames)
        if needed != z.shape[2]:
            raise ValueError(f"{num_frames} frames need {needed} latent frames, not {z.shape[2]}")
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, (-num_frames) % self.time_factor :]  # encoding padded the front
