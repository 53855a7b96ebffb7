"""Draws a scene: anti-aliased shapes from signed distances, fine textures, shading and soft shadows."""

import numpy as np

from tiny_training.scene import BACKGROUNDS, COLOURS, Scene, SceneObject


def render_frame(scene: Scene, size: int, time: float = 0.0) -> np.ndarray:
    """The scene at `time` in [0, 1] as float32 (size, size, 3) in [0, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis + scene.camera[0] * time, axis + scene.camera[1] * time)
    image = _background(scene, x, y)
    light = np.array([np.cos(scene.light), np.sin(scene.light)], dtype=np.float32)
    pixel = 2.0 / size
    for obj in scene.objects:
        image = _paint(image, obj, x, y, light, pixel, time)
    return np.clip(image, 0, 1).astype(np.float32)


def render_clip(scene: Scene, size: int, num_frames: int) -> np.ndarray:
    """The scene over time as float32 (num_frames, size, size, 3) in [0, 1]."""
    times = np.linspace(0, 1, num_frames)
    return np.stack([render_frame(scene, size, float(t)) for t in times])


def _background(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    direction, strength = scene.gradient
    shade = 1 + strength * (np.cos(direction) * x + np.sin(direction) * y)
    angle, cycles, phase, amount = scene.backdrop_wave
    u = np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y) + phase
    v = np.pi * cycles * (-np.sin(angle) * x + np.cos(angle) * y)
    if scene.backdrop == "waves":
        share = 0.5 + 0.5 * np.sin(u + 1.5 * np.sin(0.35 * v))
    elif scene.backdrop == "weave":
        product = np.sin(u) * np.sin(v)
        share = 0.5 + 0.5 * np.sign(product) * np.sqrt(np.abs(product))
    else:  # speckle
        share = np.clip(2.5 * np.sin(u) * np.sin(v + np.sin(0.6 * u)) - 0.6, 0, 1)
    share = (amount * share)[..., None]
    mixed = (1 - share) * np.asarray(BACKGROUNDS[scene.background]) + share * np.asarray(scene.backdrop_tint)
    return mixed.astype(np.float32) * shade[..., None]


def _paint(
    image: np.ndarray, obj: SceneObject, x: np.ndarray, y: np.ndarray, light: np.ndarray, pixel: float, time: float
) -> np.ndarray:
    centre = (obj.x + obj.velocity[0] * time, obj.y + obj.velocity[1] * time)
    radius = obj.radius * (1 + obj.growth * time)
    angle = obj.angle + obj.spin * time

    shadow_x, shadow_y = _local(x + 0.10 * light[0], y + 0.10 * light[1], centre, radius, angle)
    shadow = _coverage(_distance(obj.shape, shadow_x, shadow_y) * radius, 4 * pixel)
    image = image * (1 - 0.45 * shadow[..., None])

    qx, qy = _local(x, y, centre, radius, angle)
    alpha = _coverage(_distance(obj.shape, qx, qy) * radius, pixel)
    lit = ((x - centre[0]) * light[0] + (y - centre[1]) * light[1]) / radius
    shade = 1 + 0.22 * np.clip(lit, -1.2, 1.2)
    shade = shade * (1 - 0.65 * _texture(obj, qx, qy))
    colour = np.asarray(COLOURS[obj.colour], np.float32) * shade[..., None]
    return image * (1 - alpha[..., None]) + np.clip(colour, 0, 1) * alpha[..., None]


def _local(x, y, centre, radius, angle):
    """Coordinates in the object's own frame, where it has radius 1 and angle 0."""
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
    return np.cos(angle) * dx + np.sin(angle) * dy, -np.sin(angle) * dx + np.cos(angle) * dy


def _coverage(distance: np.ndarray, width: float) -> np.ndarray:
    """Share of a pixel inside the shape, for an edge that is `width` wide."""
    return np.clip(0.5 - distance / width, 0, 1)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of the unit shape, negative inside."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "ring":
        return np.abs(r - 0.72) - 0.25
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.78
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 0.98, b - 0.31), np.maximum(a - 0.31, b - 0.98))
    if shape == "triangle":
        return np.maximum(y, np.maximum(np.sqrt(0.75) * x, -np.sqrt(0.75) * x) - 0.5 * y) - 0.52
    if shape == "star":
        # fold into one of ten half-spikes, then the distance to the line from tip to notch
        sector = np.abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        px, py = r * np.cos(sector) - 1.08, r * np.sin(sector)
        ex, ey = 0.46 * np.cos(np.pi / 5) - 1.08, 0.46 * np.sin(np.pi / 5)
        return (py * -ex + px * ey) / np.hypot(ex, ey)
    raise ValueError(f"unknown shape {shape!r}")


def _texture(obj: SceneObject, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Darkening pattern in [0, 1] in the object's frame."""
    direction, frequency, phase = obj.stripe
    u = np.pi * frequency * (np.cos(direction) * x + np.sin(direction) * y) + phase
    v = np.pi * frequency * (-np.sin(direction) * x + np.cos(direction) * y)
    if obj.texture == "striped":
        return np.clip(0.5 + 1.5 * np.sin(u), 0, 1)
    if obj.texture == "dotted":
        return np.clip(3.0 * (np.cos(u) * np.cos(v)) - 0.6, 0, 1)
    if obj.texture == "checkered":
        return np.clip(0.5 + 2.5 * np.sin(0.7 * u) * np.sin(0.7 * v), 0, 1)
    return np.zeros_like(x)
