"""The STDiT3 of Open-Sora 1.2 with ERTACache, and the signal that TeaCache-type rivals read.

`ertacache.apply` puts the same mixin in front of whatever transformer a pipeline has; the class here spells
out what that does to this model.
"""

from typing import Any

from opensora12 import STDiT3
from torch import Tensor

from ertacache.patching import CachedTransformer


class ERTACacheSTDiT3(CachedTransformer, STDiT3):
    """STDiT3 whose call does nothing on a reused step.

    The pipeline calls it once a step on [captions; null captions]. On a computed step the call is STDiT3's forward:
    latents (B, C, T, H, W) in, velocity (data - noise) and variances (B, 2 C, T, H, W) out, of which the pipeline
    keeps the velocity and guides it. On a reused step no block runs: it returns an expanded zero of that shape,
    which the pipeline guides to zero, and the attached scheduler step takes the rectified combination of guided
    velocities instead.

    The sign of the velocity is opposite to that of diffusers' flow matching, and so is that of the scheduler's
    increments. The library takes gains from the scheduler's own step, so neither has to be turned around.
    """


def modulated_input(transformer: STDiT3, arguments: dict[str, Any]) -> Tensor:
    """The input of the first block's attention after its adaptive norm, (B, tokens, width): what TeaCache watches.

    Args:
        arguments: the arguments of the transformer's forward, by name.
    """
    names = ("x", "timestep", "y", "mask", "x_mask", "fps", "height", "width")
    hidden, conditioning = transformer.embed_inputs(**{name: arguments.get(name) for name in names})
    return transformer.spatial_blocks[0].modulated_input(hidden, conditioning.t6)
