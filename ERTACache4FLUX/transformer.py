"""FLUX's transformer with its one modified line, and the signal that TeaCache-type rivals read."""

import functools
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor

from ertacache.attach import CachedTransformer


class CachedFluxTransformer2DModel(CachedTransformer, FluxTransformer2DModel):
    """FLUX's transformer, whose forward runs no block on a reused step.

    Takes packed latents (B, tokens, 64) and text, and returns a velocity (noise - data) of the latents' shape. On a
    reused step that is a placeholder, an expanded zero: the scheduler gets a combination of cached velocities instead.
    """

    @functools.wraps(FluxTransformer2DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reused = self.reused_output()  # the modified line: what to return in place of running, or None
        return super().forward(*args, **kwargs) if reused is None else reused


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
