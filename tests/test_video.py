"""Videos: an MP4 that plays at the size it was given, names for VBench, and which frames stand for it."""

import numpy as np
import pytest
import torch
from mp4 import read_mp4
from torch import Tensor

from compare.pictures import pick_frames, vbench_name
from ertacache.cli.media import VideoError, write_mp4


def moving_bar(frames: int = 9, height: int = 48, width: int = 64) -> Tensor:
    """A soft bright bar that wanders to the right on a colour gradient, (F, 3, H, W)."""
    x = torch.linspace(0, 1, width).view(1, 1, 1, width)
    centre = torch.linspace(0.2, 0.8, frames).view(frames, 1, 1, 1)
    bar = torch.exp(-(((x - centre) / 0.1) ** 2))
    ramp = torch.linspace(0.1, 0.5, height).view(1, 1, height, 1) * torch.tensor([1.0, 0.6, 0.3]).view(1, 3, 1, 1)
    return (ramp + 0.5 * bar).clamp(0, 1)


@pytest.mark.parametrize("size", [(48, 64), (240, 416), (50, 66), (51, 65)])
def test_mp4_plays_at_its_own_size(tmp_path, size):
    video = moving_bar(5, *size)
    path = write_mp4(tmp_path / "clip.mp4", video, fps=16)
    frames, fps = read_mp4(path)
    assert frames.shape == (5, *size, 3) and fps == 16
    error = np.abs(frames / 255 - video.movedim(1, -1).numpy()).mean()
    assert error < 0.03  # lossy, but the same pictures in the same order
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_one_frame_is_a_video(tmp_path):
    frames, _ = read_mp4(write_mp4(tmp_path / "still.mp4", moving_bar(1), fps=16))
    assert len(frames) == 1


def test_what_is_no_video_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(VideoError, match=r"\(F, 3, H, W\)"):
        write_mp4(tmp_path / "clip.mp4", torch.zeros(3, 16, 16), fps=16)
    assert not list(tmp_path.iterdir())


def test_a_failing_encoder_leaves_the_old_file(tmp_path):
    path = write_mp4(tmp_path / "clip.mp4", moving_bar(3), fps=16)
    before = path.read_bytes()
    with pytest.raises(VideoError, match="cannot be written"):
        write_mp4(path, moving_bar(3), fps=-1)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_names_for_vbench():
    assert vbench_name("a cat runs", 3) == "a cat runs-3.mp4"
    assert vbench_name("a / b", 0) == "a _ b-0.mp4"
    long = vbench_name("ü" * 300, 12)
    assert long.endswith("-12.mp4") and len(long.encode()) <= 255


def test_frames_are_picked_from_first_to_last():
    assert pick_frames(17, 5) == [0, 4, 8, 12, 16]
    assert pick_frames(3, 8) == [0, 1, 2]
