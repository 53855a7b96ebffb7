"""STDiT3, the denoiser of Open-Sora 1.2: spatial and temporal blocks in turn, captions by cross attention.

Source: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0); keys and shapes of the state dict are those of
hpcai-tech/OpenSora-STDiT-v3. The network predicts data - noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .block import STDiT3Block, register_blocks
from .captions import select_tokens, unpack
from .checkpoint import OfficialLayout
from .layers import CaptionEmbedder, FinalLayer, FrameRotary, PatchEmbedder, ScalarEmbedder
from .positions import grid_code, grid_frequencies

__all__ = ["Conditioning", "STDiT3", "STDiT3Block", "register_blocks"]


@dataclass(frozen=True)
class Conditioning:
    """What the blocks get beside the tokens. B samples, T frames, C channels, L caption tokens.

    Attributes:
        t, t6: time embedding [B, C] and the blocks' modulation [B, 6 C].
        t_zero, t6_zero: the same at time 0; None without x_mask.
        captions, caption_mask: [B, L, C] and bool [B, 1, 1, L] or None.
        rotary: cos and sin of the frames' positions, [T, d/2] each.
    """

    t: Tensor
    t6: Tensor
    t_zero: Tensor | None
    t6_zero: Tensor | None
    captions: Tensor
    caption_mask: Tensor | None
    x_mask: Tensor | None
    rotary: tuple[Tensor, Tensor]
    num_frames: int

    def for_block(self) -> dict[str, Any]:
        """Keyword arguments of a block; a temporal one takes `rotary` too."""
        names = ("captions", "t6", "num_frames", "caption_mask", "t6_zero", "x_mask")
        return {name: getattr(self, name) for name in names}


class STDiT3(OfficialLayout, CacheMixin, ModelMixin, ConfigMixin):
    """Velocity (data - noise) of video latents.

    The configuration's fields are those of the official config.json. class_dropout_prob, drop_path and the
    switches of the original's implementation are kept for its sake and do nothing here: whoever trains drops
    captions before the call.
    """

    _no_split_modules = ("STDiT3Block",)
    _repeated_blocks = ("STDiT3Block",)
    _skip_layerwise_casting_patterns = ("x_embedder", "norm", "rope", "y_embedding", "scale_shift_table")

    @register_to_config
    def __init__(
        self,
        input_size: tuple[int | None, int | None, int | None] = (None, None, None),
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        pred_sigma: bool = True,
        drop_path: float = 0.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        enable_flash_attn: bool = False,
        enable_layernorm_kernel: bool = False,
        enable_sequence_parallelism: bool = False,
        only_train_temporal: bool = False,
        freeze_y_embedder: bool = False,
        skip_y_embedder: bool = False,
    ):
        super().__init__()
        check_widths(hidden_size, num_heads)
        self.patch_size = tuple(patch_size)
        self.out_channels = in_channels * 2 if pred_sigma else in_channels
        width = hidden_size
        self.rope = FrameRotary(width // num_heads)
        self.x_embedder = PatchEmbedder(self.patch_size, in_channels, width)
        self.t_embedder = ScalarEmbedder(width)
        self.fps_embedder = ScalarEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(caption_channels, width, model_max_length)

        def blocks(temporal: bool) -> nn.ModuleList:
            return nn.ModuleList(STDiT3Block(width, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth))

        self.spatial_blocks = blocks(temporal=False)
        self.temporal_blocks = blocks(temporal=True)
        volume = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        self.final_layer = FinalLayer(width, volume * self.out_channels)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor] | Transformer2DModelOutput:
        """Velocity of latents, and the variance channels that nobody uses.

        Args:
            x: latents [B, in_channels, frames, rows, columns]; padded to the patch size and cropped back.
            timestep: [B], 1000 (noise) .. 0 (data). A bfloat16 network rounds it, as the original does.
            y: caption states [B, 1, L, caption_channels]; with skip_y_embedder projected and packed
                [1, sum of lengths, C].
            mask: [Bm, L], 1 for real tokens, Bm a divisor of B; lengths [B] with skip_y_embedder; None for all.
            x_mask: bool [B, frames of patches]; frames with False are treated as data (time 0).
            fps: [n], frames per second; 120 for single pictures.
            height, width: [n], requested size in pixels; the first entry counts.
            return_dict: True for an output object, False for a tuple, None (default) for the tensor itself.

        Further keyword arguments of the original (num_frames, ar) have no effect.

        Returns:
            float32 [B, out_channels, frames, rows, columns].

        Raises:
            ValueError: fps, height or width are missing, or the mask does not fit.
        """
        size = x.shape[2:]
        hidden, conditioning = self.embed_inputs(x, timestep, y, mask, x_mask, fps, height, width)
        arguments = conditioning.for_block()
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            hidden = spatial(hidden, **arguments)
            hidden = temporal(hidden, **arguments, rotary=conditioning.rotary)
        c = conditioning
        hidden = self.final_layer(hidden, c.t, c.num_frames, c.t_zero, c.x_mask)
        output = self._unpatch(hidden, size).float()
        if return_dict is None:
            return output
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def embed_inputs(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Conditioning]:
        """Tokens [B, T S, C] of the first block, and what goes with them; arguments as in `forward`."""
        if fps is None or height is None or width is None:
            raise ValueError("STDiT3 needs fps, height and width: tensors of at least one element")
        dtype = self.x_embedder.proj.weight.dtype
        batch = x.shape[0]
        timestep = timestep.to(dtype).expand(batch)  # rounded before the sinusoid in bfloat16, as in the original
        fps_embedding = self.fps_embedder(fps.reshape(-1), dtype).repeat(batch // fps.numel(), 1)
        t = self.t_embedder(timestep, dtype) + fps_embedding
        t_zero = None if x_mask is None else self.t_embedder(torch.zeros_like(timestep), dtype) + fps_embedding
        captions, caption_mask = self._captions(y.to(dtype), mask)
        hidden, frames = self._tokens(x.to(dtype), height, width)
        return hidden, Conditioning(
            t=t,
            t6=self.t_block(t),
            t_zero=t_zero,
            t6_zero=None if t_zero is None else self.t_block(t_zero),
            captions=captions,
            caption_mask=caption_mask,
            x_mask=None if x_mask is None else x_mask.bool(),
            rotary=self.rope(frames),
            num_frames=frames,
        )

    def enable_cache(self, config: Any) -> None:
        """Enable one of diffusers' caches; see `blocks_in_order` for those that look for block lists."""
        with self.blocks_in_order():
            super().enable_cache(config)

    @contextmanager
    def blocks_in_order(self) -> Iterator[nn.ModuleList]:
        """All blocks in the order in which they run, as a child named `transformer_blocks`.

        diffusers' block caches take the blocks from lists with names that they know, and take the first of
        them for the head and the last for the tail. The list exists only inside the context: kept, it would
        double the keys of the state dict and the names under which offloading finds parameters.
        """
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        self._modules["transformer_blocks"] = nn.ModuleList(block for pair in pairs for block in pair)
        try:
            yield self._modules["transformer_blocks"]
        finally:
            del self._modules["transformer_blocks"]

    def _captions(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.config.skip_y_embedder:
            return select_tokens(self.y_embedder(y).squeeze(1), mask)
        if mask is None:
            raise ValueError("with skip_y_embedder the mask must hold the captions' lengths")
        return unpack(y, mask)

    def _tokens(self, x: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, int]:
        """Patches of the padded latents with their position codes, [B, T S, C], and T."""
        pads = [(-size) % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        patches = self.x_embedder(F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0])))
        channels, frames, rows, columns = patches.shape[1:]
        pixels = height.reshape(-1)[0].float() * width.reshape(-1)[0].float()
        scale = pixels.to(x.device).sqrt() / self.config.input_sq_size
        code = grid_code(rows, columns, scale, grid_frequencies(channels, x.dtype, x.device))
        tokens = patches.flatten(3).permute(0, 2, 3, 1) + code.to(x.dtype)[:, None]  # [B, T, S, C]
        return tokens.flatten(1, 2), frames

    def _unpatch(self, hidden: Tensor, size: torch.Size) -> Tensor:
        """Patches [B, T S, patch volume x out] -> [B, out, *size], cropped."""
        counts = [-(-n // patch) for n, patch in zip(size, self.patch_size, strict=True)]
        patches = hidden.unflatten(-1, (*self.patch_size, self.out_channels)).unflatten(1, counts)
        video = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, out, T, pt, H, ph, W, pw]
        video = video.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return video[:, :, : size[0], : size[1], : size[2]]


def check_widths(hidden_size: int, num_heads: int) -> None:
    """Raise ValueError where the position codes do not divide the channels."""
    if hidden_size % 4 or hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}, with an even head width"
        )
