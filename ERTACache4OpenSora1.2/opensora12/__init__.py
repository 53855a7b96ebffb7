"""Open-Sora 1.2, written from its behaviour: network, autoencoder, sampler, prompt rules and pipeline.

Importing it tells diffusers' block caches about STDiT3's blocks.
"""

from .block import STDiT3Block, register_blocks
from .pipeline import OpenSoraPipeline, OpenSoraPipelineOutput
from .scheduler import RFlowScheduler
from .stdit3 import STDiT3
from .vae import OpenSoraVAE, TemporalVAE

__all__ = [
    "OpenSoraPipeline",
    "OpenSoraPipelineOutput",
    "OpenSoraVAE",
    "RFlowScheduler",
    "STDiT3",
    "STDiT3Block",
    "TemporalVAE",
    "register_blocks",
]

register_blocks()
