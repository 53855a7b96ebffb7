"""Pictures and videos of a comparison: differences, example frames, VBench names.

F: frames; H, W: height and width in pixels. Pixels are float in [0, 1] everywhere.
"""

from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

DIFFERENCE_GAIN = 8
# What cannot stand in a file name somewhere; VBench itself uses the prompt as it is.
SEPARATORS = str.maketrans({"/": "_", "\\": "_", "\0": "_", "\n": " ", "\r": " "})
MAX_NAME_BYTES = 240


def difference(picture: Tensor, reference: Tensor) -> Tensor:
    """|picture - reference| times DIFFERENCE_GAIN, clamped to [0, 1]."""
    return ((picture - reference).abs() * DIFFERENCE_GAIN).clamp(0, 1)


def pick_frames(num_frames: int, count: int) -> list[int]:
    """`count` frame indices spread evenly from first to last; all of them if there are fewer."""
    if count >= num_frames:
        return list(range(num_frames))
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def vbench_name(prompt: str, index: int) -> str:
    """The name that VBench looks for, <prompt>-<index>.mp4.

    Path separators become underscores; a prompt too long for a file name is cut.
    """
    tail = f"-{index}.mp4"
    name = prompt.translate(SEPARATORS).encode()[: MAX_NAME_BYTES - len(tail)].decode(errors="ignore")
    return name + tail


def shrink_png(path: str | Path, colours: int = 64) -> None:
    """Reduce a PNG to a palette, in place; its texts stay. Charts need 64 colours, pictures 256."""
    with Image.open(path) as picture:
        texts = PngImagePlugin.PngInfo()
        for key, value in picture.info.items():
            if isinstance(key, str) and isinstance(value, str):
                texts.add_text(key, value)
        # dithering would treble the file; without k-means a rare colour, such as a yellow star's, is lost
        small = picture.convert("RGB").quantize(colours, kmeans=8, dither=Image.Dither.NONE)
    small.save(path, optimize=True, pnginfo=texts)
