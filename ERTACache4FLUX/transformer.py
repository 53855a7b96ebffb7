"""The FLUX transformer with ERTACache, and the signal that TeaCache-type rivals read.

`ertacache.apply` puts the same mixin in front of whatever transformer a pipeline has; the class here spells
out what that does to this model.
"""

from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor

from ertacache.patching import CachedTransformer


class ERTACacheFluxTransformer2DModel(CachedTransformer, FluxTransformer2DModel):
    """FLUX's transformer whose call does nothing on a reused step.

    On a computed step it is FluxTransformer2DModel's forward: packed latents (B, tokens, 64) and text in,
    velocity (noise - data) of the same shape out. On a reused step no block runs: it returns an expanded zero
    of that shape, and the attached scheduler step takes the rectified combination of cached velocities.
    """


def modulated_input(transformer: FluxTransformer2DModel, arguments: dict[str, Any]) -> Tensor:
    """The input of the first block after its adaptive norm, (B, tokens, width): what TeaCache watches.

    Args:
        arguments: the keyword arguments of the transformer's forward.
    """
    hidden_states = transformer.x_embedder(arguments["hidden_states"])
    timestep = arguments["timestep"].to(hidden_states.dtype) * 1000
    pooled = arguments["pooled_projections"]
    if arguments.get("guidance") is None:
        embedding = transformer.time_text_embed(timestep, pooled)
    else:
        guidance = arguments["guidance"].to(hidden_states.dtype) * 1000
        embedding = transformer.time_text_embed(timestep, guidance, pooled)
    return transformer.transformer_blocks[0].norm1(hidden_states, emb=embedding)[0]
