"""Sizes, lengths and frame rates that Open-Sora 1.2 was trained on.

Source of the tables: hpcaitech/Open-Sora, tag v1.2.0 (its datasets' aspect tables). A ratio is written height to
width, so "9:16" is a landscape picture.
"""

import functools
import json
from pathlib import Path

VIDEO_FPS = 24  # given to the network for videos
IMAGE_FPS = 120  # what single pictures were labelled with
CHUNK_FRAMES, CHUNK_LATENTS = 17, 5  # frames and latent frames that the autoencoder takes as one
FRAMES_BY_NAME = {
    **{f"{n}x": 51 * n for n in (1, 2, 4, 8, 16)},
    **{f"{2 * n}s": 51 * n for n in (1, 2, 4, 8, 16)},
}


@functools.cache
def _tables() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("aspect_tables.json").read_text())


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) in pixels.

    Args:
        resolution: "144p" to "1080p", "2k", "4k", or one of PixArt's "256" to "2880".
        aspect_ratio: height to width, such as "9:16", or its decimal in the table, such as "0.56".

    Raises:
        ValueError: one of them is not in the tables.
    """
    sizes = _tables()["sizes"]
    if str(resolution) not in sizes:
        raise ValueError(f"resolution {resolution!r} is unknown; there are {', '.join(sizes)}")
    table = sizes[str(resolution)]
    names = _tables()["ratios"]
    decimal = names.get(str(aspect_ratio), str(aspect_ratio))
    if decimal not in table:
        known = [name for name, value in names.items() if value in table]
        raise ValueError(f"aspect ratio {aspect_ratio!r} is unknown for {resolution}; there are {', '.join(known)}")
    height, width = table[decimal]
    return height, width


@functools.cache
def _listed_sizes() -> frozenset[tuple[int, int]]:
    return frozenset((h, w) for table in _tables()["sizes"].values() for h, w in table.values())


def check_size(height: int, width: int, factor: int = 8) -> None:
    """Refuse a size that the autoencoder would silently cut, unless it is one of the official sizes.

    Args:
        factor: pixels along one side of a latent. Official sizes such as 240 x 426 are cut as the original cuts
            them, here to 240 x 424.

    Raises:
        ValueError: too small, or neither official nor a multiple of the factor.
    """
    for name, value in (("height", height), ("width", width)):
        if int(value) != value or value < factor:
            raise ValueError(f"{name} is {value}, it must be a whole number of at least {factor} pixels")
    if (height, width) in _listed_sizes():
        return
    for name, value in (("height", height), ("width", width)):
        if value % factor:
            lower = value - value % factor
            raise ValueError(
                f"{name} {value} is not a multiple of {factor} (nearest: {lower} and {lower + factor}), and "
                f"{height}x{width} is none of the official sizes"
            )


def num_frames(name: str | int) -> int:
    """Frames of a video by name ("2s" is 51, "4x" is 204) or number.

    Raises:
        ValueError: no such name, or a number that the model cannot make.
    """
    if isinstance(name, str) and name in FRAMES_BY_NAME:
        return FRAMES_BY_NAME[name]
    try:
        frames = int(name)
    except ValueError:
        raise ValueError(f"num_frames {name!r} is no number and none of {', '.join(FRAMES_BY_NAME)}") from None
    check_frames(frames)
    return frames


def check_frames(frames: int) -> None:
    """Refuse lengths at which the original's times become 0 / 0.

    Raises:
        ValueError: less than 1, or 2 to 16.
    """
    if frames < 1 or 1 < frames < CHUNK_FRAMES:
        raise ValueError(f"num_frames is {frames}: Open-Sora 1.2 makes 1 frame (a picture) or {CHUNK_FRAMES} and more")


def network_fps(frames: int, fps: float = VIDEO_FPS) -> float:
    """Frame rate that the network is told: `fps` for videos, 120 for a single picture."""
    return fps if frames > 1 else IMAGE_FPS
