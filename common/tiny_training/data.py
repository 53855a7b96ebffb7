"""The training set: scenes rendered once and kept on disk, with several captions each."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_training.arrays import filled_array
from tiny_training.captions import caption
from tiny_training.render import render_clip, render_frame
from tiny_training.scene import Scene, sample_scene

CAPTIONS_PER_SCENE = 4
SCENES_PER_PIECE = 500


def scene_for(index: int, seed: int, moving: bool = False) -> Scene:
    """The scene number `index` of the set `seed`: the same on every machine."""
    return sample_scene(np.random.default_rng((seed, index)), moving)


def captions_for(index: int, seed: int, moving: bool = False) -> list[str]:
    """Captions of that scene; they differ in what they mention."""
    rng = np.random.default_rng((seed, index, 1))
    scene = scene_for(index, seed, moving)
    return [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]


def _to_bytes(frames: np.ndarray) -> np.ndarray:
    return (frames * 255 + 0.5).astype(np.uint8)


def _render(job: tuple[int, int, int, int]) -> np.ndarray:
    index, seed, size, num_frames = job
    scene = scene_for(index, seed, moving=num_frames > 1)
    return _to_bytes(render_clip(scene, size, num_frames) if num_frames > 1 else render_frame(scene, size))


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


def rendered_clip(index: int, seed: int, size: int, num_frames: int) -> np.ndarray:
    """uint8 pixels (num_frames, size, size, 3) of moving scene `index`; of one frame, the first of longer clips."""
    return _to_bytes(render_clip(scene_for(index, seed, moving=True), size, num_frames))


def rendered_clips(count: int, seed: int, size: int, num_frames: int, folder: Path) -> np.ndarray:
    """`rendered_clip` of scenes 0 to count - 1, (count, num_frames, size, size, 3), mapped from disk; resumable."""
    path = folder / f"clips-{seed}-{count}x{num_frames}x{size}.npy"
    render = partial(rendered_clip, seed=seed, size=size, num_frames=num_frames)
    with ProcessPoolExecutor() as pool:

        def fill(start: int, stop: int) -> np.ndarray:
            return np.stack(list(pool.map(render, range(start, stop), chunksize=16)))

        return filled_array(path, (count, num_frames, size, size, 3), "uint8", fill, SCENES_PER_PIECE)
