"""Generate pictures with FLUX and ERTACache: `sh run.sh`, or `python generate.py --prompt "..."`."""

import sys
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline
from torch import Tensor
from transformer import modulated_input

from ertacache import command, models, settings
from ertacache.errors import UsageError
from ertacache.files import write_atomically
from ertacache.generation import COMPARE_FLAG, generate
from ertacache.model_folder import ModelFolder
from ertacache.pictures import png_bytes
from ertacache.settings import Settings

FOLDER = Path(__file__).resolve().parent


def load(chosen: Settings) -> FluxPipeline:
    """The pipeline that the settings name: the tiny one of this folder or a real one."""
    source = models.choose(chosen)
    settings.check(chosen)
    pipe = models.load_pipeline(FluxPipeline, source, chosen)
    multiple = pipe.vae_scale_factor * 2  # the pipeline packs 2x2 latents and would round silently
    for name in ("height", "width"):
        if getattr(chosen, name) % multiple:
            raise UsageError(f"--{name} must be a multiple of {multiple}, not {getattr(chosen, name)}")
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


def main(argv: list[str] | None = None) -> None:
    chosen = settings.parse(FOLDER, argv, __doc__, extra=[COMPARE_FLAG])
    settings.prompts_of(chosen)  # a missing prompt file is said before a model loads
    pipe = load(chosen)
    generate(pipe, chosen, MODEL_FOLDER)


MODEL_FOLDER = ModelFolder("FLUX", arguments, save, modulated_input)

if __name__ == "__main__":
    sys.exit(command.run(main))
