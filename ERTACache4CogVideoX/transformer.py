"""CogVideoX's transformer with its one modified line, and the signal that TeaCache-type rivals read."""

import functools
from typing import Any

from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from ertacache.attach import CachedTransformer


class CachedCogVideoXTransformer3DModel(CachedTransformer, CogVideoXTransformer3DModel):
    """CogVideoX's transformer, whose forward runs no block on a reused step.

    Takes latents (B, F, C, H, W) and text, and returns a v-prediction of the latents' shape; with guidance B holds
    both branches, the unconditional one first. On a reused step that is a placeholder, an expanded zero: the scheduler
    gets a combination of cached guided outputs instead.
    """

    @functools.wraps(CogVideoXTransformer3DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reused = self.reused_output()  # the modified line: what to return in place of running, or None
        return super().forward(*args, **kwargs) if reused is None else reused


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
