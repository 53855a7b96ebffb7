"""The training set: scenes rendered once and kept on disk, with several captions each."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_training.captions import caption
from tiny_training.render import render_clip, render_frame
from tiny_training.scene import Scene, sample_scene

CAPTIONS_PER_SCENE = 4


def scene_for(index: int, seed: int, moving: bool = False) -> Scene:
    """The scene number `index` of the set `seed`: the same on every machine."""
    return sample_scene(np.random.default_rng((seed, index)), moving)


def captions_for(index: int, seed: int, moving: bool = False) -> list[str]:
    """Captions of that scene; they differ in what they mention."""
    rng = np.random.default_rng((seed, index, 1))
    scene = scene_for(index, seed, moving)
    return [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]


def _render(job: tuple[int, int, int, int]) -> np.ndarray:
    index, seed, size, num_frames = job
    scene = scene_for(index, seed, moving=num_frames > 1)
    frames = render_clip(scene, size, num_frames) if num_frames > 1 else render_frame(scene, size)
    return (frames * 255 + 0.5).astype(np.uint8)


def rendered_pixels(count: int, seed: int, size: int, folder: Path, num_frames: int = 1) -> np.ndarray:
    """uint8 pixels (count, [num_frames,] size, size, 3), rendered on first use and mapped from disk later."""
    path = folder / f"pixels-{seed}-{count}x{num_frames}x{size}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(i, seed, size, num_frames) for i in range(count)]
        with ProcessPoolExecutor() as pool:
            results = pool.map(_render, jobs, chunksize=64)
            pixels = np.stack(list(tqdm(results, total=count, desc="render")))
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, pixels)
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r")
