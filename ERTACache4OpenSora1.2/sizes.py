"""The size and length that the settings ask for, by number or by name, and what the model cannot make."""

import torch
from opensora12 import geometry
from opensora12.inputs import DEFAULT_RATIO, DEFAULT_RESOLUTION

from ertacache.cli.settings import Settings
from ertacache.errors import UsageError

OFFICIAL_FACTOR = 8  # pixels along one side of a latent of the official VAE
NAMES = ("resolution", "aspect_ratio")
NUMBERS = ("height", "width")


def resolve_shape(chosen: Settings) -> None:
    """Put pixels and a number of frames in place of names, in `chosen`.

    Raises:
        UsageError: an unknown name, a size both by name and by number, or 2 to 16 frames.
    """
    named, numbered = chosen.given & set(NAMES), chosen.given & set(NUMBERS)
    if named and numbered:
        raise UsageError("give --height and --width, or --resolution and --aspect-ratio, not both")
    try:
        if not numbered and (chosen.resolution is not None or chosen.aspect_ratio is not None):
            chosen.height, chosen.width = geometry.image_size(
                chosen.resolution or DEFAULT_RESOLUTION, chosen.aspect_ratio or DEFAULT_RATIO
            )
        chosen.num_frames = geometry.num_frames(chosen.num_frames)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_size(chosen: Settings, factor: int) -> None:
    """Raise UsageError for a size that is neither official nor a multiple of the VAE's `factor` pixels."""
    if chosen.dtype == "float16" and chosen.height * chosen.width > torch.finfo(torch.float16).max:
        raise UsageError(
            f"--dtype float16 cannot count the {chosen.height} x {chosen.width} pixels that place the noise grid: use "
            "bfloat16 or float32"
        )
    try:
        geometry.check_size(chosen.height, chosen.width, factor)
    except ValueError as error:
        raise UsageError(str(error)) from None
