"""Pixels to PNG, and the difference of two pictures as one that can be seen."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

DIFFERENCE_GAIN = 8


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(3, H, W) or (F, 3, H, W) in [0, 1] -> uint8 (H, W, 3) or (F, H, W, 3), rounded."""
    return (pixels.movedim(-3, -1).float().clamp(0, 1) * 255).round().to("cpu").numpy().astype(np.uint8)


def png_bytes(pixels: Tensor) -> bytes:
    """PNG of pixels (3, H, W) in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def difference(picture: Tensor, reference: Tensor) -> Tensor:
    """|picture - reference| times DIFFERENCE_GAIN, clamped to [0, 1]."""
    return ((picture - reference).abs() * DIFFERENCE_GAIN).clamp(0, 1)
