"""The CogVideoX transformer with ERTACache, and the signal that TeaCache-type rivals read.

`ertacache.apply` puts the same mixin in front of whatever transformer a pipeline has; the class here spells
out what that does to this model.
"""

from typing import Any

from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from ertacache.patching import CachedTransformer


class ERTACacheCogVideoXTransformer3DModel(CachedTransformer, CogVideoXTransformer3DModel):
    """CogVideoX's transformer whose call does nothing on a reused step.

    On a computed step it is CogVideoXTransformer3DModel's forward: latents (B, F, C, H, W) and text in,
    v-prediction of the same shape out. With guidance B holds both branches, the unconditional one first, in one
    call a step. On a reused step no block runs: it returns an expanded zero of that shape, which the pipeline
    guides to zero, and the attached scheduler step takes the rectified combination of guided outputs instead.
    """


def modulated_input(transformer: CogVideoXTransformer3DModel, arguments: dict[str, Any]) -> Tensor:
    """The video part of the first block's input after its adaptive norm, (B, tokens, width): what TeaCache watches.

    Args:
        arguments: the keyword arguments of the transformer's forward.
    """
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    time = transformer.time_proj(arguments["timestep"]).to(latents.dtype)
    embedding = transformer.time_embedding(time, arguments.get("timestep_cond"))
    tokens = transformer.patch_embed(text, latents)  # (B, text tokens + video tokens, width)
    num_text = text.shape[1]
    return transformer.transformer_blocks[0].norm1(tokens[:, num_text:], tokens[:, :num_text], embedding)[0]
