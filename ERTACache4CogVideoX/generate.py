"""Generate videos with CogVideoX and ERTACache: `sh run.sh`, or `python generate.py --prompt "..."`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from scheduler import SCHEDULERS, any_grid_scheduler
from torch import Tensor
from transformer import CachedCogVideoXTransformer3DModel, modulated_input

from ertacache.cli import command, models, run, settings
from ertacache.cli.folder import ModelFolder
from ertacache.cli.media import write_mp4
from ertacache.cli.settings import Settings
from ertacache.errors import UsageError

FOLDER = Path(__file__).resolve().parent
FRAMES_PER_CHUNK = 8  # the VAE decodes two latent frames at a time, of four frames each, after a first frame


def load(chosen: Settings) -> CogVideoXPipeline:
    """The pipeline that the settings name, on a scheduler that takes any grid."""
    source = models.choose(chosen)
    check(chosen)
    pipe = models.load_pipeline(CogVideoXPipeline, CachedCogVideoXTransformer3DModel, source, chosen)
    check_shapes(chosen, pipe)
    pipe.scheduler = any_grid_scheduler(chosen.solver, pipe.scheduler.config)
    if chosen.vae_tiling:
        enable_tiling(pipe.vae)
    return pipe


def enable_tiling(vae: AutoencoderKLCogVideoX) -> None:
    """Decode in tiles. Raises UsageError where their overlap is no whole latent, which would change the size."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    for latents, pixels, overlap in (
        (vae.tile_latent_min_height, vae.tile_sample_min_height, vae.tile_overlap_factor_height),
        (vae.tile_latent_min_width, vae.tile_sample_min_width, vae.tile_overlap_factor_width),
    ):
        if int(latents * (1 - overlap)) * scale != pixels - int(pixels * overlap):
            raise UsageError("--vae-tiling does not fit this model's VAE: use --vae-tiling false")
    vae.enable_tiling()


def check(chosen: Settings) -> None:
    """Raise UsageError for what cannot be, whatever the weights."""
    settings.check(chosen)
    if chosen.solver not in SCHEDULERS:
        raise UsageError(f"--solver must be one of {', '.join(SCHEDULERS)}, not {chosen.solver!r}")
    if chosen.num_frames <= 1 or chosen.num_frames % FRAMES_PER_CHUNK != 1:
        raise UsageError(
            f"--num-frames must be 8 n + 1 (9, 17, ... 49), not {chosen.num_frames}: the VAE drops the frames between"
        )


def check_shapes(chosen: Settings, pipe: CogVideoXPipeline) -> None:
    """Raise UsageError for sizes that this pipeline would round or fail on."""
    config = pipe.transformer.config
    multiple = pipe.vae_scale_factor_spatial * config.patch_size
    settings.check_multiple(chosen, ("height", "width"), multiple)
    fixed = not config.use_rotary_positional_embeddings  # its positions are laid out for one text length
    if fixed and chosen.max_sequence_length != config.max_text_seq_length:
        raise UsageError(
            f"--max-sequence-length must be {config.max_text_seq_length} for this model, not "
            f"{chosen.max_sequence_length}"
        )


def arguments(chosen: Settings) -> dict[str, Any]:
    """Keyword arguments of CogVideoXPipeline. Sizes are always given: its defaults are the big model's."""
    return {
        "height": chosen.height,
        "width": chosen.width,
        "num_frames": chosen.num_frames,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "use_dynamic_cfg": chosen.dynamic_guidance,
        "max_sequence_length": chosen.max_sequence_length,
    }


def save(video: Tensor, path: Path, chosen: Settings) -> Path:
    """Write pixels (F, 3, H, W) in [0, 1] as MP4."""
    return write_mp4(path.with_name(path.name + ".mp4"), video, chosen.fps, chosen.video_quality)


def variant(chosen: Settings) -> str:
    """What a calibration depends on beside size, steps and guidance scale, for its name."""
    return f"{chosen.solver}-dynamic" if chosen.dynamic_guidance else chosen.solver


MODEL_FOLDER = ModelFolder("CogVideoX", arguments, save, modulated_input, variant)
main = partial(run.main, FOLDER, load, MODEL_FOLDER)

if __name__ == "__main__":
    sys.exit(command.run(main))
