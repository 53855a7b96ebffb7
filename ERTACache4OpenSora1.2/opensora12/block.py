"""The block of STDiT3, spatial or temporal, and what diffusers' block caches need to know of it.

Source: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0). A block modulates, attends within a frame (spatial) or
along a token's frames (temporal), attends to the caption without norm or gate, and ends with a feed-forward.
"""

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

from .layers import CrossAttention, FeedForward, SelfAttention, layer_norm


class STDiT3Block(nn.Module):
    """Tokens [B, T S, C], frame by frame, -> the same.

    Args:
        temporal: attend along the frames of a token instead of within a frame.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: bool = True, temporal: bool = False):
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, heads, qk_norm)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = FeedForward(width, int(width * mlp_ratio), width)

    def forward(
        self,
        hidden_states: Tensor,
        captions: Tensor,
        t6: Tensor,
        num_frames: int,
        caption_mask: Tensor | None = None,
        t6_zero: Tensor | None = None,
        x_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One block.

        Args:
            captions: projected captions [B, L, C].
            t6: modulation from the time embedding [B, 6 C].
            num_frames: T.
            caption_mask: bool [B, 1, 1, L], see `CrossAttention`.
            t6_zero: modulation at time 0 [B, 6 C]; needed with x_mask.
            x_mask: bool [B, T]; frames with False are modulated as at time 0.
            rotary: cos and sin [T, d/2]; temporal blocks only.
        """
        shift_att, scale_att, gate_att, shift_mlp, scale_mlp, gate_mlp = self._modulation(t6, t6_zero, x_mask)
        x = hidden_states.unflatten(1, (num_frames, -1))  # [B, T, S, C]
        x = x + gate_att * self._attend(layer_norm(x) * (1 + scale_att) + shift_att, rotary)
        x = x + self.cross_attn(x.flatten(1, 2), captions, caption_mask).unflatten(1, (num_frames, -1))
        x = x + gate_mlp * self.mlp(layer_norm(x) * (1 + scale_mlp) + shift_mlp)
        return x.flatten(1, 2)

    def modulated_input(self, hidden_states: Tensor, t6: Tensor) -> Tensor:
        """The input of the block's attention, [B, T S, C]: what TeaCache watches at the first block."""
        shift, scale = (self.scale_shift_table + t6.unflatten(1, (6, -1)))[:, :2].chunk(2, dim=1)
        return layer_norm(hidden_states) * (1 + scale) + shift

    def _modulation(self, t6: Tensor, t6_zero: Tensor | None, x_mask: Tensor | None) -> tuple[Tensor, ...]:
        """Six tensors [B, 1 or T, 1, C]: shift, scale and gate of the attention, then of the feed-forward."""
        rows = (self.scale_shift_table + t6.unflatten(1, (6, -1)))[:, None]
        if x_mask is not None:
            rows_zero = (self.scale_shift_table + t6_zero.unflatten(1, (6, -1)))[:, None]
            rows = torch.where(x_mask[:, :, None, None], rows, rows_zero)
        return rows[..., None, :].unbind(2)

    def _attend(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, frames, tokens = x.shape[:3]
        if not self.temporal:
            return self.attn(x.flatten(0, 1)).view(batch, frames, tokens, -1)
        folded = x.transpose(1, 2).flatten(0, 1)
        return self.attn(folded, rotary).view(batch, tokens, frames, -1).transpose(1, 2)


def register_blocks() -> None:
    """Tell diffusers' caches (FirstBlockCache, MagCache, ...) what a block takes and returns."""
    TransformerBlockRegistry.register(
        STDiT3Block,
        TransformerBlockMetadata(
            return_hidden_states_index=0,
            return_encoder_hidden_states_index=None,
            hidden_states_argument_name="hidden_states",
        ),
    )
