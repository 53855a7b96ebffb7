"""Parts of STDiT3: embedders, attention, feed-forward and the final layer.

Attribute names are those of the official checkpoint's keys. Shapes: B samples, T frames, S tokens a frame,
N = T S, C channels, h heads of d = C / h channels, L caption tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import PERIOD, rotate, scalar_features

NORM_EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis, without an affine map."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, cast back, then times a learned weight [d]."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return normed.to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear: [..., width] -> [..., out]."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbedder(nn.Module):
    """Latents [B, channels, frames, height, width] -> patches [B, C, T, H, W]; sizes fit the patch."""

    def __init__(self, patch: tuple[int, int, int], channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ScalarEmbedder(nn.Module):
    """Scalars [n] -> [n, C]: sinusoidal features, linear, SiLU, linear."""

    FEATURES = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(scalar_features(values, self.FEATURES).to(dtype))


class CaptionEmbedder(nn.Module):
    """Captions [..., caption channels] -> [..., C], and the null caption [L, caption channels]."""

    def __init__(self, channels: int, width: int, length: int):
        super().__init__()
        self.y_proj = FeedForward(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(length, channels) / channels**0.5)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class FrameRotary(nn.Module):
    """Rotary angles of frame positions. The frequencies come from the checkpoint, so they are not recomputed."""

    def __init__(self, head_width: int):
        super().__init__()
        steps = torch.arange(0, head_width, 2, dtype=torch.float32)
        self.freqs = nn.Parameter(1.0 / PERIOD ** (steps / head_width), requires_grad=False)

    def forward(self, frames: int) -> tuple[Tensor, Tensor]:
        """cos and sin, [frames, d/2] each, in the network's dtype from the positions on."""
        positions = torch.arange(frames, dtype=self.freqs.dtype, device=self.freqs.device)
        angles = positions[:, None] * self.freqs
        return angles.cos(), angles.sin()


class SelfAttention(nn.Module):
    """Attention among the tokens of one sequence, [n, tokens, C] -> the same."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """rotary: cos and sin [tokens, d/2] where the sequence is one of frames."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the caption's, [B, N, C] and [B, L, C] -> [B, N, C]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, captions: Tensor, caption_mask: Tensor | None = None) -> Tensor:
        """caption_mask: bool [B, 1, 1, L], False for tokens that do not exist; None if all do."""
        query = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv_linear(captions).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=caption_mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches, [B, N, C] -> [B, N, patch volume x out channels]."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, t: Tensor, frames: int, t_zero: Tensor | None = None, x_mask: Tensor | None = None):
        """t, t_zero: [B, C], the time embedding and that of time 0; x_mask: bool [B, T]."""
        hidden = self._modulated(x, t)
        if x_mask is not None:
            # from the modulated tokens, not from x: the released weights were trained with it
            kept = self._modulated(hidden, t_zero).unflatten(1, (frames, -1))
            hidden = torch.where(x_mask[:, :, None, None], hidden.unflatten(1, (frames, -1)), kept).flatten(1, 2)
        return self.linear(hidden)

    def _modulated(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        return layer_norm(x) * (1 + scale) + shift
