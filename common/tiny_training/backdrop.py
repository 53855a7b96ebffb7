"""Backgrounds: plain or softly graded, of a colour that has a name; and a sprite drawn on one."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from tiny_training.sprites import SIDE

COLOURS = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.09, 0.09, 0.11),
    "grey": (0.55, 0.56, 0.58),
    "red": (0.80, 0.20, 0.20),
    "orange": (0.94, 0.56, 0.20),
    "yellow": (0.96, 0.86, 0.40),
    "green": (0.36, 0.66, 0.36),
    "turquoise": (0.35, 0.78, 0.76),
    "blue": (0.30, 0.50, 0.86),
    "purple": (0.56, 0.40, 0.76),
    "pink": (0.95, 0.66, 0.78),
    "brown": (0.50, 0.36, 0.26),
}
MAX_SLOPE = 0.22  # of brightness from one side of a background to the other, up or down
MAX_TINT = 0.03  # by which each of red, green and blue differs from the colour of the name
MARGIN = 16  # pixels of a sprite's frame that a view may reach beyond it
ZOOM = (1.0, 1.16)  # sides of the view, in sides of the sprite


@dataclass(frozen=True)
class View:
    """Where a sprite stands in the picture: left, top and side of the window onto it, in its pixels."""

    left: float
    top: float
    side: float
    mirrored: bool = False


def sample_view(rng: np.random.Generator, may_mirror: bool) -> View:
    """A window that shows all of the sprite, at most MARGIN pixels beside it."""
    side = SIDE * rng.uniform(*ZOOM)
    left, top = -(side - SIDE) * rng.uniform(0, 1, 2)
    return View(left, top, side, may_mirror and bool(rng.random() < 0.5))


def background(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """float32 (size, size, 3) in [0, 1]: the named colour, a little off, brighter towards some side or not at all."""
    colour = np.asarray(COLOURS[name]) + rng.uniform(-MAX_TINT, MAX_TINT, 3)
    slope = rng.uniform(-MAX_SLOPE, MAX_SLOPE) * (rng.random() < 0.7)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, size)
    ramp = across[None, :] * np.cos(angle) + across[:, None] * np.sin(angle)
    return np.clip(colour * (1 + slope * ramp[..., None]), 0, 1).astype(np.float32)


def draw(sprites: np.ndarray, view: View, behind: np.ndarray) -> np.ndarray:
    """uint8 (frames, size, size, 3): sprites, uint8 (frames, SIDE, SIDE, 4), seen through `view`, on `behind`."""
    size = len(behind)
    box = tuple(MARGIN + edge for edge in (view.left, view.top, view.left + view.side, view.top + view.side))
    frames = []
    for sprite in sprites:
        padded = Image.fromarray(np.pad(sprite, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))))
        small = padded.resize((size, size), Image.Resampling.BICUBIC, box=box)
        frames.append(np.asarray(small))
    cut = np.stack(frames).astype(np.float32) / 255
    cut = cut[:, :, ::-1] if view.mirrored else cut
    alpha = cut[..., 3:]
    return (255 * (alpha * cut[..., :3] + (1 - alpha) * behind) + 0.5).astype(np.uint8)
