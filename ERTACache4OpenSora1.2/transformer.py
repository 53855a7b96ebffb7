"""Open-Sora 1.2's transformer with its one modified line, and the signal that TeaCache-type rivals read."""

import functools
from typing import Any

from opensora12 import STDiT3
from torch import Tensor

from ertacache.attach import CachedTransformer


class CachedSTDiT3(CachedTransformer, STDiT3):
    """STDiT3, whose forward runs no block on a reused step.

    The pipeline calls it once a step on [captions; null captions]. It takes latents (B, C, T, H, W) and returns a
    velocity (data - noise) with variances, (B, 2 C, T, H, W), of which the pipeline guides the velocity. On a reused
    step that is a placeholder, an expanded zero: the scheduler gets a combination of cached guided velocities instead.

    The sign of the velocity is opposite to that of diffusers' flow matching, and so is that of the scheduler's
    increments. The library takes gains from the scheduler's own step, so neither has to be turned around.
    """

    @functools.wraps(STDiT3.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reused = self.reused_output()  # the modified line: what to return in place of running, or None
        return super().forward(*args, **kwargs) if reused is None else reused


def modulated_input(transformer: STDiT3, arguments: dict[str, Any]) -> Tensor:
    """The input of the first block's attention after its adaptive norm, (B, tokens, width): what TeaCache watches.

    Args:
        arguments: the arguments of the transformer's forward, by name.
    """
    names = ("x", "timestep", "y", "mask", "x_mask", "fps", "height", "width")
    hidden, conditioning = transformer.embed_inputs(**{name: arguments.get(name) for name in names})
    return transformer.spatial_blocks[0].modulated_input(hidden, conditioning.t6)
