"""Predict the quality by cross-validation: PSNR on prompts that were not fitted to."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ertacache.cache import Cache
from ertacache.fit.runs import Runs
from ertacache.metrics import worst_decile

FOLDS = 2


def cross_validate(runs: Runs, fitted_to: Callable[[Sequence[int]], Cache]) -> dict[str, Any] | None:
    """PSNR in dB to the uncached results: mean, its range, worst decile and each prompt's; None for a single prompt.

    Fold i leaves out the prompts i, i + FOLDS, ...

    Args:
        fitted_to: rows of prompts -> the cache of a run of all prompts under what is fitted to those rows.
    """
    if len(runs) < FOLDS:
        return None
    values = torch.zeros(len(runs))
    for fold in range(FOLDS):
        left_out = list(range(fold, len(runs), FOLDS))
        rows = [row for row in range(len(runs)) if row not in left_out]
        values[left_out] = runs.quality(fitted_to(rows))[left_out]
    return {**quality_of(values), "each": values.tolist()}


def quality_of(values: Tensor) -> dict[str, Any]:
    """What a file says of the PSNR in dB of prompts that were left out, (P,)."""
    return {
        "psnr": float(values.mean()),
        "psnr_range": mean_range(values),
        "psnr_p10": float(worst_decile(values, True)),
        "folds": FOLDS,
        "each": values.tolist(),
    }


def mean_range(values: Tensor) -> list[float]:
    """Where the mean over all prompts lies nine times of ten, told from a sample of them, (P,): low and high.

    Student's interval: prompts differ by many decibels, so the mean of eight is not that of the next eight.
    """
    degrees = len(values) - 1
    quantile = 1.645 * (1 + 1 / degrees + 1 / degrees**2)  # Student's t at 0.95 from the normal one, to 2 % from 2 on
    mean, half = float(values.mean()), quantile * float(values.std()) / math.sqrt(len(values))
    return [mean - half, mean + half]
