"""Predict the quality by cross-validation: PSNR on prompts that were not fitted to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ertacache.cache import Cache
from ertacache.fit.runs import Runs
from ertacache.metrics import psnr, worst_decile

# rows that are fitted to -> the cache of a run of all prompts under what those rows make
CacheWithout = Callable[[Sequence[int]], Cache]


def fold_count(runs: Runs, folds: int) -> int:
    """How many folds the prompts are enough for; 0 where there is nothing to predict from."""
    return min(folds, len(runs)) if folds >= 2 and len(runs) >= 2 else 0


def cross_validate(runs: Runs, folds: int, cache_fitted_to: CacheWithout) -> dict[str, Any] | None:
    """PSNR in dB to the uncached results, mean and worst decile; fold i leaves out the prompts i, i + folds, ...

    None where there are too few prompts, or folds, to leave any out.
    """
    count = fold_count(runs, folds)
    if count == 0:
        return None
    values = torch.zeros(len(runs))
    for fold in range(count):
        left_out = list(range(fold, len(runs), count))
        rows = [row for row in range(len(runs)) if row not in left_out]
        values[left_out] = psnr(runs.pixels(cache_fitted_to(rows)), runs.record.pixels)[left_out].float()
    return {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True)), "folds": count}
