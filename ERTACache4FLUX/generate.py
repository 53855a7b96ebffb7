"""Generate pictures with FLUX and ERTACache: `sh run.sh`, or `python generate.py --prompt "..."`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline
from torch import Tensor
from transformer import CachedFluxTransformer2DModel, modulated_input

from ertacache.cli import command, models, run, settings
from ertacache.cli.folder import ModelFolder
from ertacache.cli.media import png_bytes
from ertacache.cli.settings import Settings
from ertacache.files import write_atomically

FOLDER = Path(__file__).resolve().parent


def load(chosen: Settings) -> FluxPipeline:
    """The pipeline that the settings name: the tiny one of this folder or a real one."""
    source = models.choose(chosen)
    settings.check(chosen)
    pipe = models.load_pipeline(FluxPipeline, CachedFluxTransformer2DModel, source, chosen)
    multiple = pipe.vae_scale_factor * 2  # the pipeline packs 2x2 latents and would round silently
    settings.check_multiple(chosen, ("height", "width"), multiple)
    return pipe


def arguments(chosen: Settings) -> dict[str, Any]:
    """Keyword arguments of FluxPipeline. Size and text length are always given: its defaults are the big model's."""
    return {
        "height": chosen.height,
        "width": chosen.width,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "max_sequence_length": chosen.max_sequence_length,
    }


def save(picture: Tensor, path: Path, _: Settings) -> Path:
    """Write pixels (3, H, W) in [0, 1] as PNG."""
    return write_atomically(path.with_name(path.name + ".png"), png_bytes(picture))


MODEL_FOLDER = ModelFolder("FLUX", arguments, save, modulated_input)
main = partial(run.main, FOLDER, load, MODEL_FOLDER)

if __name__ == "__main__":
    sys.exit(command.run(main))
