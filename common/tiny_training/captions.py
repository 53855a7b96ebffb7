"""Captions: the sentence that tells part of a scene, and the way back from a sentence to what it names.

A caption names the objects with colour, shape and place, sometimes their size, texture and motion and the
background. It leaves the rest unsaid (light, rotation, stripe direction, exact position, camera drift), so
that a generator has to decide on it.
"""

from dataclasses import dataclass

import numpy as np

from tiny_training.scene import BACKGROUNDS, COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES, TEXTURES, Scene, SceneObject


@dataclass(frozen=True)
class NamedObject:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str
    place: str
    size: str | None = None
    texture: str | None = None
    direction: str | None = None


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene; which sizes, textures and motions it mentions is drawn from `rng`."""
    order = rng.permutation(len(scene.objects))
    parts = [_object_phrase(scene.objects[i], rng) for i in order]
    text = " and ".join(parts)
    if rng.random() < 0.5:
        text += f" on a {scene.background} background"
    return text


def _object_phrase(obj: SceneObject, rng: np.random.Generator) -> str:
    words = ["a"]
    if rng.random() < 0.5:
        words.append(obj.size)
    if rng.random() < 0.6:
        words.append(obj.texture)
    words += [obj.colour, obj.shape]
    if obj.direction and rng.random() < 0.8:
        words += ["moving", obj.direction]
    words += ["at", "the", obj.place]
    return " ".join(words)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "at", "the", "and", "on", "background", "moving"}
    for group in (COLOURS, SHAPES, TEXTURES, SIZES, PLACES, BACKGROUNDS, DIRECTIONS):
        for name in group:
            words.update(name.split())
    return sorted(words)


def parse_caption(text: str) -> tuple[list[NamedObject], str | None]:
    """The objects and the background that a caption of this grammar names.

    Raises:
        ValueError: a part of the text names no shape, colour or place.
    """
    background = None
    if " on a " in text:
        text, _, tail = text.rpartition(" on a ")
        background = tail.removesuffix(" background")
    return [_parse_object(part) for part in text.split(" and ")], background


def _parse_object(part: str) -> NamedObject:
    head, _, place = part.partition(" at the ")
    words = head.split()
    direction = words[words.index("moving") + 1] if "moving" in words else None

    def named(group) -> str | None:
        return next((word for word in words if word in group), None)

    shape, colour = named(SHAPES), named(COLOURS)
    if shape is None or colour is None or place not in PLACES:
        raise ValueError(f"cannot find a shape, colour and place in {part!r}")
    return NamedObject(shape, colour, place, named(SIZES), named(TEXTURES), direction)
