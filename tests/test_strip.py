"""The strip of a folder's page: what it shows of pictures and of videos."""

import io

import pytest
import strip
import torch
from PIL import Image


@pytest.mark.parametrize(("shape", "columns"), [((9, 3, 8, 8), 6), ((4, 17, 3, 8, 8), 6), ((2, 2, 3, 8, 8), 4)])
def test_pictures_or_frames_fill_the_columns(shape, columns):
    results = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert len(strip._still(results)) == columns
    with Image.open(io.BytesIO(strip.figure(results, [("ours", 0.5, results * 0.9)]))) as drawn:
        rows = 3  # uncached, ours, its difference
        assert drawn.height == pytest.approx(1.5 * rows * strip.DPI, abs=1)
        assert drawn.width == pytest.approx((1.5 * columns + strip.LABEL_INCHES) * strip.DPI, abs=1)


def test_of_a_video_the_first_middle_and_last_frame_are_shown():
    videos = torch.arange(17.0).view(1, 17, 1, 1, 1).expand(2, 17, 3, 4, 4)
    assert [float(picture[0, 0, 0]) for picture in strip._still(videos)] == [0, 8, 16, 0, 8, 16]
