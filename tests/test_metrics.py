"""Metrics against closed forms, and LPIPS against the pair that its authors publish."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compare.lpips import TRUNK_VARIABLE, LpipsUnavailableError, alexnet_features, load_lpips
from ertacache.metrics import psnr, ssim, temporal_error, worst_decile

LPIPS_FOLDER = Path(__file__).parents[2] / "shared" / "lpips"
needs_trunk = pytest.mark.skipif(not LPIPS_FOLDER.is_dir(), reason=f"no AlexNet trunk in {LPIPS_FOLDER}")


def random_batch(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_psnr_of_a_constant_offset_is_its_decibels():
    reference = torch.full((2, 3, 8, 8), 0.5)
    image = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(image, reference).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_of_identical_pictures_is_120_db():
    image = random_batch(3, 3, 8, 8)
    assert psnr(image, image).tolist() == [120.0] * 3


def test_psnr_of_a_video_averages_the_error_before_the_logarithm():
    reference = torch.zeros(1, 2, 3, 8, 8)
    video = reference.clone()
    video[:, 1] = 0.2  # mse 0.04 in one frame of two
    assert psnr(video, reference).item() == pytest.approx(-10 * math.log10(0.02))


def test_ssim_of_constant_pictures_is_the_luminance_term():
    image, reference, c1 = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6), 0.01**2
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    assert ssim(image, reference).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_window_is_eleven_pixels_of_sigma_one_and_a_half():
    """One 11 x 11 picture has one window, so the formula can be written out."""
    image, reference = random_batch(1, 1, 11, 11).repeat(1, 3, 1, 1), random_batch(2, 1, 11, 11)[1:].repeat(1, 3, 1, 1)
    window = torch.exp(-0.5 * (torch.arange(-5, 6).double() / 1.5) ** 2)
    window = torch.outer(window, window) / window.sum() ** 2
    a, b = image[0, 0].double(), reference[0, 0].double()
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
    cov = (window * a * b).sum() - mean_a * mean_b
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
    expected /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    assert ssim(image, reference).item() == pytest.approx(expected.item(), abs=1e-6)


def test_ssim_of_a_video_is_the_mean_over_its_frames():
    video, reference = random_batch(2, 3, 3, 16, 16), random_batch(4, 3, 3, 16, 16)[2:]
    frames = ssim(video.flatten(0, 1), reference.flatten(0, 1))
    assert torch.equal(ssim(video, reference), frames.view(2, 3).mean(dim=1))


def test_temporal_error_sees_flicker_and_no_still_offset():
    reference = random_batch(1, 4, 3, 8, 8) / 2
    flicker = reference.clone()
    flicker[:, 1::2] += 0.1
    assert temporal_error(reference + 0.25, reference).item() == pytest.approx(0, abs=1e-7)
    assert temporal_error(flicker, reference).item() == pytest.approx(0.1)


def test_temporal_error_is_the_difference_of_the_frame_differences():
    """A bright frame that comes and goes is counted at both of its ends; three frames have two differences."""
    reference = torch.zeros(2, 3, 3, 4, 4)
    video = reference.clone()
    video[0, 1] = 0.3
    video[1, 2] = 0.3
    assert temporal_error(video, reference).tolist() == pytest.approx([0.3, 0.15])


def test_a_video_is_worth_what_its_frames_are():
    """The loop over frames gives what one mean over all pixels gives."""
    video, reference = random_batch(4, 5, 3, 12, 12)[:2], random_batch(4, 5, 3, 12, 12)[2:]
    error = (video.double() - reference.double()).square().flatten(1).mean(dim=1)
    change = (video.double().diff(dim=1) - reference.double().diff(dim=1)).abs().flatten(1).mean(dim=1)
    assert torch.allclose(psnr(video, reference), -10 * error.log10())
    assert torch.allclose(temporal_error(video, reference), change)


def test_worst_decile_is_the_low_or_the_high_percentile():
    values = torch.arange(11.0)
    assert worst_decile(values, higher_is_better=True) == pytest.approx(1.0)
    assert worst_decile(values.tolist(), higher_is_better=False) == pytest.approx(9.0)


@pytest.mark.parametrize("metric", [psnr, ssim, temporal_error])
def test_other_shapes_are_refused(metric):
    with pytest.raises(ValueError, match="shapes differ"):
        metric(torch.zeros(1, 2, 3, 16, 16), torch.zeros(1, 3, 3, 16, 16))


def example(name: str) -> Tensor:
    pixels = np.array(Image.open(LPIPS_FOLDER / name).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


@needs_trunk
def test_lpips_of_the_published_pair():
    metric = load_lpips(LPIPS_FOLDER / "alexnet_features.safetensors")
    images = torch.cat([example("ex_p0.png"), example("ex_p1.png"), example("ex_ref.png")])
    distances = metric(images, example("ex_ref.png").expand_as(images))
    assert distances.tolist() == pytest.approx([0.7219, 0.1376, 0.0], abs=5e-5)


@needs_trunk
def test_lpips_of_a_video_is_the_mean_over_its_frames(monkeypatch):
    monkeypatch.setenv(TRUNK_VARIABLE, str(LPIPS_FOLDER / "alexnet_features.safetensors"))
    metric = load_lpips()
    reference = example("ex_ref.png").expand(2, -1, -1, -1)
    video = torch.cat([example("ex_p0.png"), example("ex_p1.png")])
    assert metric(video[None], reference[None]).item() == pytest.approx((0.7219 + 0.1376) / 2, abs=5e-5)


def test_missing_and_foreign_trunks_are_a_reason(tmp_path, monkeypatch):
    with pytest.raises(LpipsUnavailableError, match="cannot read"):
        load_lpips(tmp_path / "absent.safetensors")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(LpipsUnavailableError, match="no AlexNet trunk"):
        load_lpips(tmp_path / "foreign.pt")
    monkeypatch.delenv(TRUNK_VARIABLE, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)  # as if not installed
    with pytest.raises(LpipsUnavailableError, match=TRUNK_VARIABLE):
        load_lpips()
    assert os.environ.get(TRUNK_VARIABLE) is None


def test_trunk_has_the_keys_of_torchvision():
    assert {key.split(".")[0] for key in alexnet_features().state_dict()} == {"0", "3", "6", "8", "10"}
