"""What a training draws from: captioned pictures or clips, each a function of its number alone.

Emoji (`tiny_training.emoji`) are what the embedded pipelines learn; the drawn scenes here need no download and serve
`--smoke` and the tests.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np

from tiny_training import captions
from tiny_training.arrays import filled_array, locked
from tiny_training.render import render_clip
from tiny_training.scene import SHAPES, Scene, sample_scene

EXAMPLES_PER_PIECE = 500
CAPTIONS_PER_SCENE = 3
FIRST_UNSEEN = 1_000_000  # examples from here on are never trained on

_source: "Source"  # of a worker that draws


class Source(Protocol):
    """Any number of examples of the things in `names`."""

    @property
    def names(self) -> list[str]:
        """What the pictures show."""

    @property
    def key(self) -> str:
        """Names the examples in a file name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(frames, height, width, 3) of an example."""

    def label(self, index: int) -> int:
        """Which of `names` example `index` shows."""

    def captions(self, index: int) -> list[str]:
        """What a person may say of it, of the same number for all."""

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (frames, height, width, 3)."""

    def vocabulary(self) -> list[str]:
        """Every word of the captions, sorted."""

    def held_out(self, count: int) -> list[tuple[str, int]]:
        """Captions of no example, each with which of `names` it asks for."""


@dataclass(frozen=True)
class SceneSet:
    """Drawn scenes; one is named by the shape of its first object."""

    seed: int
    size: int = 64
    num_frames: int = 1

    @property
    def names(self) -> list[str]:
        return list(SHAPES)

    @property
    def key(self) -> str:
        return f"scenes-{self.seed}-{self.num_frames}x{self.size}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_frames, self.size, self.size, 3)

    def scene(self, index: int) -> Scene:
        return sample_scene(np.random.default_rng((self.seed, index)), moving=True)

    def label(self, index: int) -> int:
        return self.names.index(self.scene(index).objects[0].shape)

    def captions(self, index: int) -> list[str]:
        rng = np.random.default_rng((self.seed, index, 1))
        return [captions.caption(self.scene(index), rng) for _ in range(CAPTIONS_PER_SCENE)]

    def pixels(self, index: int) -> np.ndarray:
        return (render_clip(self.scene(index), self.size, self.num_frames) * 255 + 0.5).astype(np.uint8)

    def vocabulary(self) -> list[str]:
        return captions.vocabulary()

    def held_out(self, count: int) -> list[tuple[str, int]]:
        return [(self.captions(index)[0], self.label(index)) for index in range(FIRST_UNSEEN, FIRST_UNSEEN + count)]


def rendered(source: Source, count: int, folder: Path) -> np.ndarray:
    """uint8 (count, frames, height, width, 3): the first examples of the source, kept in `folder`; resumable.

    Where another process fills the same file, this one waits for it.
    """
    path = folder / f"pixels-{source.key}-{count}.npy"
    # workers that are forked have the source already; sending its pictures to them would take longer than drawing
    workers = ProcessPoolExecutor(mp_context=get_context("fork"), initializer=_remember, initargs=(source,))
    with locked(path), workers as pool:

        def fill(start: int, stop: int) -> np.ndarray:
            return np.stack(list(pool.map(_pixels, range(start, stop), chunksize=8)))

        return filled_array(path, (count, *source.shape), "uint8", fill, EXAMPLES_PER_PIECE)


def _remember(source: Source) -> None:
    global _source
    _source = source


def _pixels(index: int) -> np.ndarray:
    return _source.pixels(index)
