"""Captions of drawn scenes: the sentence that tells part of one.

A caption names the objects with colour, shape and place, sometimes their size, texture and motion and the
background. It leaves the rest unsaid (light, rotation, stripe direction, exact position, camera drift), so
that a generator has to decide on it.
"""

import numpy as np

from tiny_training.scene import BACKGROUNDS, COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES, TEXTURES, Scene, SceneObject


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
