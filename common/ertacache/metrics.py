"""Measure how near pictures and videos are to the uncached ones: PSNR, SSIM, temporal error.

Pure functions on pixels, floats in [0, 1].
n: items of a batch; F: frames; H, W: height and width in pixels. Every metric returns one number per item. LPIPS needs
weights and is in `compare/lpips.py`.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ertacache.errors import ERTACacheError

IDENTICAL_DB = 120.0
SSIM_SIGMA = 1.5  # pixels; with it scikit-image's Gaussian window is 11 x 11
SSIM_WINDOW = 11
DECILE = 0.1


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, -10 log10(mse) for a peak of 1.

    Args:
        image: (n, ...) in [0, 1]; for a video the squared error is averaged over all frames first.
        reference: the same shape.

    Returns:
        (n,) dB, float64, at most 120 dB (identical items). Raises ValueError where the shapes differ.
    """
    _check(image, reference)
    error = torch.stack([_squared_error(a, b) for a, b in zip(image, reference, strict=True)])
    return -10 * error.clamp_min(10 ** (-IDENTICAL_DB / 10)).log10()


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004): 11x11 Gaussian window of sigma 1.5, K = (0.01, 0.03), peak 1.

    Computed by scikit-image, with the population covariance that the paper uses; colours are averaged.
    Args:
        image: (n, 3, H, W) pictures or (n, F, 3, H, W) videos in [0, 1]; H and W at least 11.
        reference: the same shape.

    Returns:
        (n,) float64 in [-1, 1]; for a video the mean over its frames.

    Raises ValueError: the shapes differ, are no pictures or videos, or are smaller than the window.
    """
    _check(image, reference)
    if image.ndim not in (4, 5) or min(image.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs (n, 3, H, W) or (n, F, 3, H, W) of at least 11 x 11, not {tuple(image.shape)}")
    frames = [_ssim_of_frame(a, b) for a, b in zip(_frames(image), _frames(reference), strict=True)]
    return torch.tensor(frames, dtype=torch.float64).unflatten(0, (len(image), -1)).mean(dim=1)


def temporal_error(video: Tensor, reference: Tensor) -> Tensor:
    """Flicker that the reference does not have: mean absolute difference between the changes from frame to frame.

    E = mean over frames, colours and pixels of |(v_{f+1} - v_f) - (r_{f+1} - r_f)|; a still offset gives 0.

    Args:
        video: (n, F, 3, H, W) in [0, 1], F at least 2.
        reference: the same shape.

    Returns:
        (n,) float64.

    Raises ValueError: the shapes differ or there is only one frame.
    """
    _check(video, reference)
    if video.ndim != 5 or video.shape[1] < 2:
        raise ValueError(f"temporal_error needs (n, F, 3, H, W) with F > 1, not {tuple(video.shape)}")
    return torch.stack([_change_error(a, b) for a, b in zip(video, reference, strict=True)])


def worst_decile(values: Tensor | Sequence[float], higher_is_better: bool) -> float:
    """The 10th percentile of the items, or the 90th if lower is better: a tenth of them is worse.

    Args:
        values: (n,), n > 0; percentiles between two items are interpolated linearly.
        higher_is_better: True for PSNR and SSIM, False for LPIPS and temporal error.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.quantile(DECILE if higher_is_better else 1 - DECILE))


def _check(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(image.shape)} and {tuple(reference.shape)}")


# A video of 81 frames of 832 x 480 has a hundred million values, so no copy of a whole batch, and none in float64.


def _squared_error(image: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of one item (...), float64; a video frame by frame, to bound memory."""
    if image.ndim == 4:
        return torch.stack([_squared_error(a, b) for a, b in zip(image, reference, strict=True)]).mean()
    return (image.double() - reference.double()).square().mean()


def _change_error(video: Tensor, reference: Tensor) -> Tensor:
    """`temporal_error` of one video (F, 3, H, W), from the errors e_f = v_f - r_f of two frames at a time."""
    errors = (a.double() - b.double() for a, b in zip(video, reference, strict=True))
    return torch.stack([(after - before).abs().mean() for before, after in pairwise(errors)]).mean()


def _frames(batch: Tensor) -> Iterator[np.ndarray]:
    """Yield the frames of (n, 3, H, W) or (n, F, 3, H, W) as (3, H, W), float64 on the host."""
    return (frame.double().cpu().numpy() for frame in batch.reshape(-1, *batch.shape[-3:]))


def _ssim_of_frame(image: np.ndarray, reference: np.ndarray) -> float:
    # Imported here: calibrating and generating need no scikit-image.
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise ERTACacheError("SSIM needs scikit-image: pip install scikit-image") from None
    return float(
        structural_similarity(
            image,
            reference,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=SSIM_SIGMA,
            use_sample_covariance=False,
        )
    )
