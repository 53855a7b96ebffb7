"""Image and video conditioning by mask strategy, and what one loop hands on to the next.

A mask strategy says which latent frames of which reference go where: "loop,reference,from,to,length,edit", several
of them separated by ";". Source of the rules: hpcaitech/Open-Sora, tag v1.2.0 (its inference helpers).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .geometry import CHUNK_FRAMES, CHUNK_LATENTS

VIDEO_EXTENSIONS = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif"})


@dataclass(frozen=True)
class MaskRule:
    """One entry of a mask strategy.

    Attributes:
        loop: at which loop it counts.
        reference: index among the prompt's references.
        source, target: first latent frame in the reference and in the video; negative from the end.
        length: latent frames.
        edit: 0 keeps the frames, 1 makes them anew, between is how far they may change.
    """

    loop: int = 0
    reference: int = 0
    source: int = 0
    target: int = 0
    length: int = 1
    edit: float = 0.0

    def __str__(self) -> str:
        return ",".join(str(v) for v in (self.loop, self.reference, self.source, self.target, self.length, self.edit))


def parse_mask_strategy(text: str | None) -> list[MaskRule]:
    """Rules of a mask strategy; fields that are left out have their defaults.

    Raises:
        ValueError: an entry is not one to six numbers.
    """
    if not text:
        return []
    rules = []
    for entry in text.split(";"):
        fields = entry.split(",")
        try:
            numbers = [int(field) for field in fields[:5]] + [float(field) for field in fields[5:]]
            rules.append(MaskRule(*numbers))
        except (ValueError, TypeError):
            raise ValueError(
                f"mask strategy entry {entry!r} is not 'loop,reference,from,to,length,edit' (one to six numbers)"
            ) from None
    return rules


def find_nearest_point(value: int, point: int, max_value: int) -> int:
    """The multiple of `point` nearest to `value` that leaves room for another `point` below `max_value`."""
    count, rest = divmod(value, point)
    if rest > point / 2 and count < max_value // point - 1:
        count += 1
    return count * point


def dframe_to_frame(latent_frames: int) -> int:
    """Frames of that many latent frames; whole chunks only.

    Raises:
        ValueError: not a multiple of 5.
    """
    if latent_frames % CHUNK_LATENTS:
        raise ValueError(f"{latent_frames} latent frames are no whole chunks: use a multiple of {CHUNK_LATENTS}")
    return latent_frames // CHUNK_LATENTS * CHUNK_FRAMES


def apply_mask_strategy(
    latents: Tensor, references: Sequence[Sequence[Tensor]], strategies: Sequence[str], loop: int, align: int | None = 5
) -> tuple[Tensor, Tensor]:
    """Put reference frames into the noise.

    Args:
        latents: [B, C, T, H, W]; not changed.
        references: for every sample its references' latents, [C, T, H, W] each.
        strategies: for every sample its mask strategy.
        align: latent frames that positions are moved to multiples of; None leaves them.

    Returns:
        Latents with the references in place, and the mask [B, T] float32 of `scheduler.FrameMask`.

    Raises:
        ValueError: a reference that a rule names does not exist or has another size.
    """
    latents = latents.clone()
    mask = torch.ones(latents.shape[0], latents.shape[2], device=latents.device)
    for i, strategy in enumerate(strategies):
        for rule in parse_mask_strategy(strategy):
            if rule.loop == loop:
                _apply_rule(rule, latents[i], mask[i], references[i], align)
    return latents, mask


def _apply_rule(rule: MaskRule, latents: Tensor, mask: Tensor, references: Sequence[Tensor], align: int | None) -> None:
    if not -len(references) <= rule.reference < len(references):
        raise ValueError(f"mask strategy {rule} names reference {rule.reference}, the prompt has {len(references)}")
    reference = references[rule.reference]
    if reference.shape[0] != latents.shape[0] or reference.shape[2:] != latents.shape[2:]:
        raise ValueError(f"a reference's latents are {list(reference.shape)}, the video's {list(latents.shape)}")
    total, available = latents.shape[1], reference.shape[1]
    source = rule.source + available if rule.source < 0 else rule.source
    target = rule.target + total if rule.target < 0 else rule.target
    if align is not None:
        source, target = find_nearest_point(source, align, available), find_nearest_point(target, align, total)
    length = min(rule.length, total - target, available - source)
    if source < 0 or target < 0 or length < 1:
        raise ValueError(f"mask strategy {rule} does not fit {available} reference and {total} video latent frames")
    latents[:, target : target + length] = reference[:, source : source + length].to(latents)
    mask[target : target + length] = rule.edit


def continue_strategy(strategy: str, loop: int, reference: int, length: int, edit: float) -> str:
    """A strategy by which `loop` begins with the last `length` latent frames of a reference."""
    rule = MaskRule(loop, reference, -length, 0, length, edit)
    return f"{strategy};{rule}" if strategy else str(rule)


def load_reference(reference: Any, height: int, width: int) -> Tensor:
    """Pixels [3, T, height, width] in [-1, 1], scaled to cover the size and cut around their middle.

    Args:
        reference: a PIL image, a list of them, a file's path, or pixels [3, T, h, w] in [-1, 1] of that very size.

    Raises:
        ValueError: pixels of another size, or nothing that is known.
    """
    if isinstance(reference, Tensor):
        if reference.ndim != 4 or reference.shape[0] != 3 or reference.shape[2:] != (height, width):
            raise ValueError(f"reference pixels are {list(reference.shape)}, they must be [3, T, {height}, {width}]")
        return reference
    if isinstance(reference, (str, Path)):
        reference = read_frames(Path(reference))
    frames = [reference] if isinstance(reference, Image.Image) else list(reference)
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        raise ValueError("a reference is a PIL image, a list of them, a path, or a tensor of pixels")
    pixels = np.stack([np.asarray(cover(frame.convert("RGB"), height, width)) for frame in frames])
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1


def read_frames(path: Path) -> list[Image.Image]:
    """Frames of a picture or video file. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"reference file {path} does not exist")
    if path.suffix.lower() not in VIDEO_EXTENSIONS:
        try:
            return [Image.open(path).convert("RGB")]
        except UnidentifiedImageError:
            raise ValueError(f"reference file {path} is no picture, and no video by its name") from None
    import imageio.v3 as iio  # slow to import, and only videos need it

    return [Image.fromarray(frame) for frame in iio.imiter(path)]


def cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture until it covers the size, and cut out the middle."""
    scale = max(height / picture.height, width / picture.width)
    rows, columns = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return picture.resize((columns, rows), Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
