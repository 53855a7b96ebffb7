"""Generate videos with Open-Sora 1.2 and ERTACache: `sh run.sh`, or `python generate.py --prompt "..."`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from opensora12 import OpenSoraPipeline
from sizes import OFFICIAL_FACTOR, check_size, resolve_shape
from torch import Tensor
from transformer import CachedSTDiT3, modulated_input
from weights import load_official, needed_files, official_layout

from ertacache.cli import command, models, run, settings
from ertacache.cli.folder import ModelFolder
from ertacache.cli.media import png_bytes, write_mp4
from ertacache.cli.settings import Settings
from ertacache.errors import UsageError
from ertacache.files import write_atomically

FOLDER = Path(__file__).resolve().parent
PRESETS = {"slow": 0.1, "fast": 0.18}  # thresholds of the paper for this model


def load(chosen: Settings) -> OpenSoraPipeline:
    """The pipeline that the settings name: the tiny one of this folder, a saved one, or the official repositories."""
    source = models.choose(chosen, needed_files(chosen))
    check(chosen)
    if source == chosen.real_model or (chosen.model != "tiny" and official_layout(source)):
        check_size(chosen, OFFICIAL_FACTOR)  # before tens of gigabytes are read
        return load_official(chosen, source)
    pipe = models.load_pipeline(OpenSoraPipeline, CachedSTDiT3, source, chosen, float32_parts=["text_encoder"])
    check_size(chosen, pipe.vae.spatial_factor)
    return pipe


def check(chosen: Settings) -> None:
    """Resolve names of sizes, lengths and thresholds; raise UsageError for what cannot be, whatever the weights."""
    chosen.threshold = threshold_of(chosen.threshold, chosen.method)
    resolve_shape(chosen)
    settings.check(chosen)


def threshold_of(value: str | float | None, method: str) -> float | None:
    """A threshold as a number, or by the name of a preset, which is the published method's."""
    if value in PRESETS and method == "teacache":
        raise UsageError(f"--threshold {value} belongs to --method paper: TeaCache takes a number")
    if value is None or value in PRESETS:
        return PRESETS.get(value)
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"--threshold takes {', '.join(PRESETS)} or a number, not {value!r}") from None


def arguments(chosen: Settings) -> dict[str, Any]:
    """Keyword arguments of OpenSoraPipeline. Sizes are always given: its defaults are the big model's."""
    return {
        "height": chosen.height,
        "width": chosen.width,
        "num_frames": chosen.num_frames,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "fps": chosen.fps,
        "aesthetic_score": chosen.aesthetic_score,
        "motion_score": chosen.motion_score,
        "camera_motion": chosen.camera_motion,
    }


def save(video: Tensor, path: Path, chosen: Settings) -> Path:
    """Write pixels (F, 3, H, W) in [0, 1] as MP4, or as PNG where there is one frame."""
    if len(video) == 1:
        return write_atomically(path.with_name(path.name + ".png"), png_bytes(video[0]))
    return write_mp4(path.with_name(path.name + ".mp4"), video, chosen.fps, chosen.video_quality)


def variant(chosen: Settings) -> str:
    """What moves the times beside size, length and steps, for the names of calibrations: bfloat16 rounds sizes."""
    return chosen.dtype


MODEL_FOLDER = ModelFolder("Open-Sora 1.2", arguments, save, modulated_input, variant)
main = partial(run.main, FOLDER, load, MODEL_FOLDER)

if __name__ == "__main__":
    sys.exit(command.run(main))
