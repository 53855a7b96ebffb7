"""Training pictures and clips of Fluent emoji on coloured backgrounds, with the captions that a person would type.

A caption names the subject, a skin tone other than yellow, and often the background. It leaves the rest unsaid: size
and place, whether it is mirrored, the light on the background, and of a clip the moment that it starts at.

A pair of subject and background that `is_held_out` is never trained on; prompts for tests are made of those.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tiny_training.backdrop import COLOURS, background, draw, sample_view
from tiny_training.sprites import TONES, Sprites

LISTS = Path(__file__).parent / "subjects"
BACKGROUNDS = list(COLOURS)
HELD_OUT_EVERY = 11  # one background in so many is held out of each subject
LIVELY = 0.6  # clips start where first and last frame differ by this share of the most that they do anywhere


@dataclass(frozen=True)
class Subject:
    """Something to draw: its file name without a skin tone, and its name with an article."""

    code: str
    phrase: str
    may_mirror: bool = True


@dataclass(frozen=True)
class Example:
    """What a training picture or clip shows."""

    subject: int
    tone: str | None
    background: str
    stem: str  # of the file


def load_subjects(name: str) -> list[Subject]:
    """The subjects of subjects/NAME.txt, a line each: code points, phrase; `!` before the phrase: not mirrored."""
    subjects = []
    for line in (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        code, _, phrase = line.partition(" ")
        subjects.append(Subject(code, phrase.lstrip("!"), not phrase.startswith("!")))
    return subjects


def is_held_out(subject: int, background: int) -> bool:
    """Whether the pair is kept for tests; every subject has one such background or two."""
    return (5 * subject + background) % HELD_OUT_EVERY == 0


def caption(phrase: str, tone: str | None = None, colour: str | None = None) -> str:
    """`a woman running, dark skin, on a blue background`, with as much of it as is said."""
    article = "an" if colour is not None and colour[0] in "aeiou" else "a"
    said = [phrase, tone and f"{tone} skin", colour and f"on {article} {colour} background"]
    return ", ".join(part for part in said if part)


def words(text: str) -> list[str]:
    """The words of a caption as the tokenizer splits it."""
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


@dataclass(frozen=True)
class EmojiSet:
    """A `Source` of some subjects, who take turns."""

    name: str
    sprites: Sprites
    subjects: list[Subject]
    seed: int
    size: int = 64
    num_frames: int = 1

    @property
    def names(self) -> list[str]:
        return [subject.phrase for subject in self.subjects]

    @property
    def key(self) -> str:
        # by its subjects too: examples that are kept from before the list changed are others
        listed = zlib.crc32(repr(self.subjects).encode())
        return f"{self.name}-{listed:08x}-{self.seed}-{self.num_frames}x{self.size}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_frames, self.size, self.size, 3)

    @cached_property
    def looks(self) -> list[dict[str | None, str]]:
        """Files of each subject by skin tone. Raises KeyError for a subject without pictures."""
        looks = self.sprites.looks(self.num_frames)
        return [looks[subject.code] for subject in self.subjects]

    @cached_property
    def starts(self) -> dict[str, np.ndarray]:
        return {}

    def label(self, index: int) -> int:
        return index % len(self.subjects)

    def example(self, index: int) -> Example:
        """Example number `index`: its subject, and a look and a background that are drawn."""
        rng = np.random.default_rng((self.seed, index))
        subject = self.label(index)
        tone = list(self.looks[subject])[rng.integers(len(self.looks[subject]))]
        free = [name for i, name in enumerate(BACKGROUNDS) if not is_held_out(subject, i)]
        return Example(subject, tone, free[rng.integers(len(free))], self.looks[subject][tone])

    def captions(self, index: int) -> list[str]:
        """Two with the background, one without, and one without the article."""
        example = self.example(index)
        phrase = self.subjects[example.subject].phrase
        full = caption(phrase, example.tone, example.background)
        bare = caption(phrase.removeprefix("an ").removeprefix("a "), example.tone, example.background)
        return [full, full, caption(phrase, example.tone), bare]

    def pixels(self, index: int) -> np.ndarray:
        example = self.example(index)
        rng = np.random.default_rng((self.seed, index, 1))
        frames = self.sprites[example.stem]
        if example.stem not in self.starts:
            self.starts[example.stem] = lively_starts(frames, self.num_frames)
        start = rng.choice(self.starts[example.stem])
        view = sample_view(rng, self.subjects[example.subject].may_mirror)
        behind = background(example.background, rng, self.size)
        return draw(frames[start : start + self.num_frames], view, behind)

    def vocabulary(self) -> list[str]:
        said = [caption(subject.phrase) for subject in self.subjects]
        said += [caption("", tone, colour) for tone in TONES.values() for colour in BACKGROUNDS]
        return sorted({word for text in said for word in words(text)})

    def held_out(self, count: int) -> list[tuple[str, int]]:
        """Subjects in a fixed random order, each on a background that it was never trained on."""
        rng = np.random.default_rng((self.seed, 2))
        prompts: list[tuple[str, int]] = []
        while len(prompts) < count:
            for subject in rng.permutation(len(self.subjects)).tolist():
                kept = [name for i, name in enumerate(BACKGROUNDS) if is_held_out(subject, i)]
                tones = list(self.looks[subject])
                tone, colour = tones[rng.integers(len(tones))], kept[rng.integers(len(kept))]
                prompts.append((caption(self.subjects[subject].phrase, tone, colour), subject))
        return prompts[:count]


def lively_starts(frames: np.ndarray, num_frames: int) -> np.ndarray:
    """First frames of the clips of `num_frames` in which the last frame differs from the first nearly as it can."""
    count = len(frames) - num_frames + 1
    small = frames[:, ::4, ::4].astype(np.float32)
    change = np.abs(small[num_frames - 1 :] - small[:count]).mean((1, 2, 3))
    return np.flatnonzero(change >= LIVELY * change.max())


def everything(sprites: Sprites, num_frames: int = 1) -> list[Subject]:
    """All subjects with pictures of as many frames, without names, but those of subjects/unseen.txt."""
    unseen = {subject.code for subject in load_subjects("unseen")}
    return [Subject(code, "") for code in sorted(set(sprites.looks(num_frames)) - unseen)]
