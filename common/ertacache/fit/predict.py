"""Predict the quality by cross-validation: PSNR on prompts that were not fitted to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ertacache.cache import Cache
from ertacache.fit.runs import Runs
from ertacache.fit.together import Together
from ertacache.metrics import worst_decile

FOLDS = 2


def cross_validate(runs: Runs | Together, fitted_to: Callable[[Sequence[int]], Cache]) -> dict[str, Any] | None:
    """PSNR in dB to the uncached results, mean and worst decile; None for a single prompt.

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
    return {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True)), "folds": FOLDS}
