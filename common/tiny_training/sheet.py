"""Contact sheets: what a pipeline makes of its prompts, at a glance."""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

GAP = 4  # pixels between frames
TEXT_WIDTH = 236  # pixels for the prompt beside a row of frames
TEXT_HEIGHT = 62  # and below a picture
CHARACTERS = 36  # of the prompt in a line


def picture_sheet(pictures: Tensor, prompts: list[str], path: Path, scale: int = 3) -> None:
    """Six pictures a row with their prompts below.

    Args:
        pictures: (n, 3, H, W) in [0, 1].
        scale: how much larger than life.
    """
    height, width = pictures.shape[2] * scale + TEXT_HEIGHT, pictures.shape[3] * scale + 2 * GAP
    sheet = Image.new("RGB", (6 * width, -(-len(pictures) // 6) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left, top = index % 6 * width, index // 6 * height
        pixels = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        tile = pixels.resize((width - 2 * GAP, height - TEXT_HEIGHT), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        text = textwrap.fill(prompt, CHARACTERS - 2)
        draw.multiline_text((left + 2, top + tile.height + 2), text, fill="black", spacing=1)
    _save(sheet, path)


def clip_sheet(clips: Tensor, prompts: list[str], frames: list[int], path: Path, scale: int = 2) -> None:
    """One row a prompt with the named frames of its clip.

    Args:
        clips: (n, 3, F, H, W) in [0, 1].
        frames: indices of the frames to show.
        scale: how much larger than life.
    """
    height, width = clips.shape[3] * scale, clips.shape[4] * scale
    size = (TEXT_WIDTH + len(frames) * (width + GAP), len(prompts) * (height + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        top = row * (height + GAP)
        draw.multiline_text((2, top + 2), textwrap.fill(prompt, CHARACTERS), fill="black", spacing=1)
        for column, frame in enumerate(frames):
            pixels = (clip[:, frame].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (TEXT_WIDTH + column * (width + GAP), top))
    _save(sheet, path)


def _save(sheet: Image.Image, path: Path) -> None:
    """Save with 256 colours: the sheets are checked in."""
    sheet.quantize(256, kmeans=8, dither=Image.Dither.NONE).save(path, optimize=True)
