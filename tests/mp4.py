"""Reads a video back, to see that it is what was to be written."""

from pathlib import Path

import imageio.v2 as imageio
import numpy as np


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames of a video as uint8 (F, H, W, 3), and its frames per second."""
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack([np.asarray(frame) for frame in reader]), float(reader.get_meta_data()["fps"])
