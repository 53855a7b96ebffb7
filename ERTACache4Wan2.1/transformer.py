"""The Wan2.1 transformer with ERTACache, and the signal that TeaCache-type rivals read.

`ertacache.apply` puts the same mixin in front of whatever transformer a pipeline has; the class here spells
out what that does to this model.
"""

from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from ertacache.patching import CachedTransformer


class ERTACacheWanTransformer3DModel(CachedTransformer, WanTransformer3DModel):
    """Wan's transformer whose call does nothing on a reused step.

    The pipeline calls it twice a step, with the prompt ("cond") and without ("uncond"), and puts the two together
    as v = v_u + g (v_c - v_u). On a computed step both calls are WanTransformer3DModel's forward: latents
    (B, 16, frames, height, width) and text in, velocity (noise - data) of the latents' shape out. On a reused
    step no block runs in either of them: each returns an expanded zero of that shape, and the attached scheduler
    step takes the rectified combination of cached guided velocities. So there is one history, not one a branch,
    and nothing to confuse when guidance is off.
    """


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
