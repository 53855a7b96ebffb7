"""Generate videos with Wan2.1 and ERTACache: `sh run.sh`, or `python generate.py --prompt "..."`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import WanPipeline
from scheduler import GRIDS, SOLVERS, make_scheduler
from torch import Tensor
from transformer import CachedWanTransformer3DModel, modulated_input

from ertacache.cli import command, models, run, settings
from ertacache.cli.folder import ModelFolder
from ertacache.cli.media import write_mp4
from ertacache.cli.models import ModelError
from ertacache.cli.settings import Settings
from ertacache.errors import UsageError

FOLDER = Path(__file__).resolve().parent
SIDE_MULTIPLE = 16  # pixels: the VAE takes 8, the transformer patches of 2 of them


def load(chosen: Settings) -> WanPipeline:
    """The pipeline that the settings name, the tiny one of this folder or a real one, with the chosen sampler."""
    source = models.choose(chosen)
    check(chosen)
    try:
        pipe = models.load_pipeline(WanPipeline, CachedWanTransformer3DModel, source, chosen, float32_parts=["vae"])
    except ModelError as error:
        raise ModelError(
            f"{error}. To download the real one: `../.venv/bin/hf download {chosen.real_model}` (the repository "
            "without -Diffusers in its name has another format)"
        ) from error
    pipe.scheduler = make_scheduler(chosen.solver, chosen.grid, chosen.flow_shift)
    return pipe


def check(chosen: Settings) -> None:
    """Raise UsageError for settings that the pipeline would refuse late, or round without a word."""
    settings.check(chosen)
    for name, allowed in (("solver", SOLVERS), ("grid", GRIDS)):
        if getattr(chosen, name) not in allowed:
            raise UsageError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(chosen, name)!r}")
    settings.check_multiple(chosen, ("height", "width"), SIDE_MULTIPLE)
    if chosen.num_frames < 1 or chosen.num_frames % 4 != 1:
        raise UsageError(f"--num-frames must be 1, 5, 9, ... (4 n + 1), not {chosen.num_frames}")
    if not chosen.flow_shift > 0:
        raise UsageError(f"--flow-shift must be above 0, not {chosen.flow_shift:g}")


def arguments(chosen: Settings) -> dict[str, Any]:
    """Keyword arguments of WanPipeline. All are always given: its defaults are the big model's, less one.

    That one is the negative prompt, which the official code has a text for and the pipeline leaves empty.
    """
    return {
        "negative_prompt": chosen.negative_prompt,
        "height": chosen.height,
        "width": chosen.width,
        "num_frames": chosen.num_frames,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "max_sequence_length": chosen.max_sequence_length,
    }


def save(video: Tensor, path: Path, chosen: Settings) -> Path:
    """Write pixels (F, 3, H, W) in [0, 1] as MP4."""
    return write_mp4(path.with_name(path.name + ".mp4"), video, chosen.fps, chosen.video_quality)


def variant(chosen: Settings) -> str:
    """What moves the noise grid beside the number of steps, for the names of calibrations."""
    return f"{chosen.solver}-{chosen.grid}-shift{chosen.flow_shift:g}"


MODEL_FOLDER = ModelFolder("Wan2.1", arguments, save, modulated_input, variant)
main = partial(run.main, FOLDER, load, MODEL_FOLDER)

if __name__ == "__main__":
    sys.exit(command.run(main))
