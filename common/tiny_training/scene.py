"""Scenes: everything that is in a picture or clip.

A `Scene` fixes all that the renderer draws; `captions.py` tells part of it in words.

Lengths are in units of half the picture: x and y run from -1 (left, top) to 1 (right, bottom). Time runs
from 0 (first frame) to 1 (last frame); a still picture is time 0.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.86, 0.14, 0.15),
    "orange": (0.95, 0.52, 0.10),
    "yellow": (0.95, 0.86, 0.20),
    "green": (0.16, 0.62, 0.24),
    "cyan": (0.18, 0.76, 0.80),
    "blue": (0.16, 0.30, 0.84),
    "purple": (0.55, 0.22, 0.72),
    "pink": (0.95, 0.50, 0.72),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": (0.28, 0.33), "large": (0.42, 0.50)}
PLACES = {
    "top left": (-0.58, -0.58),
    "top": (0.0, -0.58),
    "top right": (0.58, -0.58),
    "left": (-0.58, 0.0),
    "center": (0.0, 0.0),
    "right": (0.58, 0.0),
    "bottom left": (-0.58, 0.58),
    "bottom": (0.0, 0.58),
    "bottom right": (0.58, 0.58),
}
BACKGROUNDS = {
    "dark": (0.16, 0.16, 0.20),
    "grey": (0.50, 0.51, 0.54),
    "bright": (0.90, 0.90, 0.88),
    "sandy": (0.78, 0.68, 0.50),
    "mossy": (0.36, 0.43, 0.30),
}
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
# no smooth backdrop and few plain objects: guidance would choose them nearly always, as the densest mode, and
# pictures without texture make every way of saving steps look good
BACKDROPS = ("waves", "weave", "speckle")
TEXTURE_SHARES = (0.1, 0.3, 0.3, 0.3)
MAX_TILT = 0.35  # radians; objects stand nearly upright, so that a small model can learn their shapes


@dataclass(frozen=True)
class SceneObject:
    """One object. `stripe`: (direction in radians, frequency per radius, phase); `growth` and `spin` per clip."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float
    stripe: tuple[float, float, float]
    direction: str | None = None
    velocity: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0
    growth: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Objects in painting order on a graded background, lit from one side."""

    objects: tuple[SceneObject, ...]
    background: str
    gradient: tuple[float, float]  # direction in radians, strength
    backdrop: str
    backdrop_wave: tuple[float, float, float, float]  # direction, cycles, phase, strength
    backdrop_tint: tuple[float, float, float]  # colour that the pattern mixes into the background
    light: float  # direction in radians
    camera: tuple[float, float] = (0.0, 0.0)  # drift over the clip


def sample_scene(rng: np.random.Generator, moving: bool = False) -> Scene:
    """Draw a random scene; `moving` gives the objects velocities, spin and growth, and the camera a drift."""
    count = int(rng.choice(3, p=(0.45, 0.40, 0.15))) + 1
    places = rng.choice(list(PLACES), size=count, replace=False)
    wave = (rng.uniform(0, np.pi), rng.uniform(4, 8), rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.0))
    objects = tuple(_sample_object(rng, str(place), moving) for place in places)
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(
        objects=objects,
        background=background,
        gradient=(rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.25)),
        backdrop=str(rng.choice(BACKDROPS)),
        backdrop_wave=tuple(map(float, wave)),
        light=rng.uniform(0, 2 * np.pi),
        camera=tuple(rng.uniform(-0.15, 0.15, 2)) if moving else (0.0, 0.0),
        backdrop_tint=_sample_tint(rng, BACKGROUNDS[background]),
    )


def _sample_tint(rng: np.random.Generator, background: tuple[float, float, float]) -> tuple[float, float, float]:
    """A muted colour clearly lighter or darker than the background; no caption tells which."""
    level = float(np.mean(background))
    choices = [v for v in (level - rng.uniform(0.32, 0.5), level + rng.uniform(0.32, 0.5)) if 0 <= v <= 1]
    tint = rng.choice(choices) + rng.uniform(-0.12, 0.12, 3)
    return tuple(np.clip(tint, 0, 1).tolist())


def _sample_object(rng: np.random.Generator, place: str, moving: bool) -> SceneObject:
    size = str(rng.choice(list(SIZES)))
    centre = np.array(PLACES[place]) + rng.uniform(-0.09, 0.09, 2)
    radius = rng.uniform(*SIZES[size])
    motion = {}
    if moving:
        direction = None if rng.random() < 0.25 else str(rng.choice(list(DIRECTIONS)))
        speed = rng.uniform(0.45, 0.8)
        motion = {
            "direction": direction,
            "velocity": tuple(speed * v for v in DIRECTIONS[direction]) if direction else (0.0, 0.0),
            "spin": rng.uniform(-1.5, 1.5),
            "growth": rng.uniform(-0.25, 0.35),
        }
    return SceneObject(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        texture=str(rng.choice(TEXTURES, p=TEXTURE_SHARES)),
        size=size,
        place=place,
        x=float(centre[0]),
        y=float(centre[1]),
        radius=float(radius),
        angle=rng.uniform(-MAX_TILT, MAX_TILT),
        # periods of about 4 to 6 pixels at 64x64, whatever the object's size
        stripe=(rng.uniform(0, np.pi), radius * rng.uniform(5.5, 8.0), rng.uniform(0, 2 * np.pi)),
        **motion,
    )
