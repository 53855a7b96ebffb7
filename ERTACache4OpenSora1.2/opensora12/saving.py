"""Decoded videos as 8-bit frames, and the names of their files, as Open-Sora 1.2 makes them."""

from pathlib import Path

import torch
from torch import Tensor


def to_uint8_frames(video: Tensor) -> Tensor:
    """[3, T, height, width] in [-1, 1] -> uint8 [T, height, width, 3].

    All arithmetic is done in the dtype that comes in and the end is cut off, not rounded, as in the original;
    so bfloat16 videos have coarser steps.
    """
    scaled = (video.clamp(-1, 1) + 1) / 2 * 255 + 0.5
    return scaled.clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)


def save_path(
    save_dir: str | Path,
    sample_name: str | None = None,
    sample_idx: int | None = None,
    prompt: str | None = None,
    prompt_as_path: bool = False,
    num_sample: int = 1,
    k: int | None = None,
) -> str:
    """Path of a sample without its extension: <dir>/sample_0000, "-k" after it for the k-th of several.

    Args:
        prompt_as_path: name the file after the prompt instead of its index.
    """
    if prompt_as_path:
        name = f"{sample_name or ''}{prompt}"
    else:
        name = f"{'sample' if sample_name is None else sample_name}_{sample_idx:04d}"
    return str(Path(save_dir) / (name if num_sample == 1 else f"{name}-{k}"))
