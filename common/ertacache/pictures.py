"""Pixels to PNG, and the strip that shows uncached, cached and their difference."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

DIFFERENCE_GAIN = 8


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(3, H, W) or (F, 3, H, W) in [0, 1] -> uint8 (H, W, 3) or (F, H, W, 3), rounded."""
    return (pixels.movedim(-3, -1).float().clamp(0, 1) * 255).round().to("cpu").numpy().astype(np.uint8)


def png_bytes(pixels: Tensor, enlarge: int = 1) -> bytes:
    """PNG of pixels (3, H, W) in [0, 1], each pixel repeated `enlarge` times."""
    image = Image.fromarray(to_uint8(pixels))
    if enlarge > 1:
        image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def difference(picture: Tensor, reference: Tensor) -> Tensor:
    """|picture - reference| times DIFFERENCE_GAIN, clamped to [0, 1]."""
    return ((picture - reference).abs() * DIFFERENCE_GAIN).clamp(0, 1)
