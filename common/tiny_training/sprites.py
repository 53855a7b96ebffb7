"""Sprites: the pictures of Fluent emoji (Microsoft, MIT licence), cut out, decoded once and mapped from disk.

The pictures come from packages that any npm client fetches, and are unpacked into one folder each:

    npm pack @lobehub/fluent-emoji-3d@1.1.0     # stills; -anim-1 to -4 @1.0.0 in place of -3d: moving ones
    mkdir -p DATA/stills && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C DATA/stills --strip-components=2

(moving ones all into DATA/clips). A file is named by its code points, skin tones among them: 1f3c3-1f3fb.webp.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from ertacache.files import write_atomically
from tiny_training.arrays import locked

SIDE = 96  # pixels of a decoded sprite
EVERY = 2  # one of so many frames of an animation is kept: 84 ms apart
STILL = 4  # files of fewer kept frames do not count as moving
TONES = {"1f3fb": "light", "1f3fc": "medium light", "1f3fd": "medium", "1f3fe": "medium dark", "1f3ff": "dark"}


@dataclass(frozen=True)
class Sprites:
    """Cut-out pictures by file name without its ending, each one frame or several, uint8 (frames, SIDE, SIDE, 4)."""

    pixels: np.ndarray  # of all files, one after another
    places: dict[str, tuple[int, int]]  # first frame and number of frames

    def __getitem__(self, stem: str) -> np.ndarray:
        start, count = self.places[stem]
        return self.pixels[start : start + count]

    def looks(self, num_frames: int = 1) -> dict[str, dict[str | None, str]]:
        """Files that are long enough by their subject, a name without skin tone, and by skin tone (None: yellow)."""
        found: dict[str, dict[str | None, str]] = {}
        for stem, (_, count) in self.places.items():
            if count >= num_frames:
                found.setdefault(without_tone(stem), {})[tone_of(stem)] = stem
        return found


def tone_of(stem: str) -> str | None:
    """The skin tone in a file name; None where there is none."""
    return next((TONES[part] for part in stem.split("-") if part in TONES), None)


def without_tone(stem: str) -> str:
    """The file name of the same subject without a skin tone and without the mark that asks for a coloured picture."""
    return "-".join(part for part in stem.split("-") if part not in TONES and part != "fe0f")


def load_sprites(folder: Path, moving: bool) -> Sprites:
    """All sprites of `folder`/stills or `folder`/clips, decoded on first use.

    Raises:
        FileNotFoundError: the pictures are not there; it says how to get them.
    """
    source = folder / ("clips" if moving else "stills")
    pixels, places = source.with_suffix(".npy"), source.with_suffix(".json")
    with locked(pixels):
        if not places.exists():
            files = sorted(source.glob("*.webp"))
            if not files:
                raise FileNotFoundError(f"no pictures in {source}; {__doc__}")
            _decode_all(files, moving, pixels, places)
    table = json.loads(places.read_text())
    return Sprites(np.load(pixels, mmap_mode="r"), {stem: tuple(place) for stem, place in table.items()})


def _decode_all(files: list[Path], moving: bool, pixels: Path, places: Path) -> None:
    with ProcessPoolExecutor() as pool:
        counts = list(pool.map(_num_frames, files, chunksize=32))
        chosen = [(f, n if moving else 1) for f, n in zip(files, counts, strict=True) if not moving or n >= STILL]
        kept = [n for _, n in chosen]
        starts = np.cumsum([0, *kept]).tolist()
        array = np.lib.format.open_memmap(pixels, "w+", dtype="uint8", shape=(starts[-1], SIDE, SIDE, 4))
        frames = pool.map(decoded, [f for f, _ in chosen], [moving] * len(chosen), chunksize=4)
        for start, part in zip(starts, frames, strict=False):
            array[start : start + len(part)] = part
        array.flush()
    table = {f.stem: place for (f, _), place in zip(chosen, zip(starts, kept, strict=False), strict=True)}
    write_atomically(places, json.dumps(table).encode())


def _num_frames(path: Path) -> int:
    """Frames that `decoded` keeps of a moving picture."""
    with Image.open(path) as picture:
        return -(-getattr(picture, "n_frames", 1) // (1 if picture.width == SIDE else EVERY))


def decoded(path: Path, moving: bool) -> np.ndarray:
    """uint8 (frames, SIDE, SIDE, 4): one of EVERY frames of a moving picture, the first one of another."""
    with Image.open(path) as picture:
        return np.stack([np.asarray(_small(frame)) for frame in _frames(picture, moving)])


def _frames(picture: Image.Image, moving: bool) -> Iterator[Image.Image]:
    if not moving:
        yield picture
        return
    every = 1 if picture.width == SIDE else EVERY  # a packed copy holds the kept frames alone
    for index, frame in enumerate(ImageSequence.Iterator(picture)):
        if index % every == 0:
            yield frame


def _small(frame: Image.Image) -> Image.Image:
    return frame.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
