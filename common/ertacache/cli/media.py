"""Write pictures and videos: pixels to PNG and MP4.

F: frames; H, W: height and width in pixels. Pixels are float in [0, 1] everywhere.
"""

import io
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from ertacache.errors import ERTACacheError

MP4_QUALITY = 8  # of imageio's scale from 0 to 10, where 10 is the best


class VideoError(ERTACacheError, RuntimeError):
    """A video cannot be written."""


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(3, H, W) or (F, 3, H, W) in [0, 1] -> uint8 (H, W, 3) or (F, H, W, 3), rounded."""
    return (pixels.movedim(-3, -1).float().clamp(0, 1) * 255).round().to("cpu").numpy().astype(np.uint8)


def png_bytes(pixels: Tensor) -> bytes:
    """PNG of pixels (3, H, W) in [0, 1]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_uint8(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_mp4(path: str | Path, frames: Tensor, fps: float, quality: float = MP4_QUALITY) -> Path:
    """Write frames as H.264 in an MP4 of exactly their size; the file appears whole or not at all.

    Every player knows yuv420p, which needs even sides. A video with an odd side is written as yuv444p instead of being
    scaled: it keeps its size, but some browsers do not play it.

    Args:
        path: ends in .mp4.
        frames: (F, 3, H, W) in [0, 1].
        fps: frames per second.
        quality: 0 to 10; 10 is best.

    Raises VideoError: the frames are no video, or the encoder failed.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape) < 1:
        raise VideoError(f"a video needs frames (F, 3, H, W), not {tuple(frames.shape)}")
    import imageio.v2 as imageio  # brings an encoder along, and takes a moment to import

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    even = frames.shape[-1] % 2 == 0 and frames.shape[-2] % 2 == 0
    try:
        with imageio.get_writer(
            temporary,
            format="FFMPEG",
            mode="I",
            fps=fps,
            codec="libx264",
            quality=quality,
            macro_block_size=1,  # imageio would scale to multiples of 16
            pixelformat="yuv420p" if even else "yuv444p",
            ffmpeg_log_level="error",
        ) as writer:
            for frame in frames:  # one at a time: a long video in 8 bits beside the float one is memory for nothing
                writer.append_data(to_uint8(frame))
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise VideoError(f"{path} cannot be written as MP4 ({first})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
