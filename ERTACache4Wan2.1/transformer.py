"""Wan2.1's transformer with its one modified line, and the signal that TeaCache-type rivals read."""

import functools
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from ertacache.attach import CachedTransformer


class CachedWanTransformer3DModel(CachedTransformer, WanTransformer3DModel):
    """Wan's transformer, whose forward runs no block on a reused step.

    The pipeline calls it twice a step, with the prompt ("cond") and without ("uncond"), and puts the two together as
    v = v_u + g (v_c - v_u). It takes latents (B, 16, frames, height, width) and text, and returns a velocity
    (noise - data) of the latents' shape. On a reused step both calls return a placeholder, an expanded zero: the
    scheduler gets a combination of cached guided velocities, so there is one history and no branch to confuse.
    """

    @functools.wraps(WanTransformer3DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reused = self.reused_output()  # the modified line: what to return in place of running, or None
        return super().forward(*args, **kwargs) if reused is None else reused


def modulated_input(transformer: WanTransformer3DModel, arguments: dict[str, Any]) -> Tensor:
    """The input of the first block's attention after its adaptive norm, (B, tokens, width): what TeaCache watches.

    Args:
        arguments: the keyword arguments of the transformer's forward.
    """
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    hidden_states = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)  # (B, C, f, h, w) -> (B, n, C)
    embedder = transformer.condition_embedder
    waves = embedder.timesteps_proj(arguments["timestep"])
    waves = waves.to(next(embedder.time_embedder.parameters()).dtype)
    embedding = embedder.time_embedder(waves).type_as(text)
    rows = embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1))  # (B, 6, C)
    block = transformer.blocks[0]
    shift, scale = (block.scale_shift_table + rows.float())[:, :2].chunk(2, dim=1)
    return (block.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
