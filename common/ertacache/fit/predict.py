"""Predict the quality by cross-validation, PSNR on prompts that were not fitted to, and keep what does no harm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ertacache.cache import Cache
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.fit.result import plain_reuse
from ertacache.fit.runs import Runs
from ertacache.metrics import worst_decile
from ertacache.replay import cache_of

FOLDS = 2
OTHERS = 24  # prompts for whose mean the range is
GUARD_PROMPTS = 4  # on which plain reuse is tried
HARM = 0.5  # dB, by which the fit may be worse on so few prompts
RUIN = 20.0  # dB, by which the published method must not be worse


def cross_validate(runs: Runs, fitted_to: Callable[[Sequence[int]], Cache]) -> dict[str, Any] | None:
    """PSNR in dB to the uncached results: mean, its range, worst decile and each prompt's; None for a single prompt.

    Fold i leaves out the prompts i, i + FOLDS, ..., with all of their seeds.

    Args:
        fitted_to: rows of prompts -> the cache of a run of all prompts under what is fitted to those rows.
    """
    if len(runs) < FOLDS:
        return None
    values = torch.zeros(len(runs))
    folds = folds_of(runs)
    for fold in range(FOLDS):
        left_out = [row for row in range(len(runs)) if folds[row] == fold]
        rows = [row for row in range(len(runs)) if folds[row] != fold]
        values[left_out] = runs.quality(fitted_to(rows))[left_out]
    return {**quality_of(values), "each": values.tolist()}


def folds_of(runs: Runs) -> list[int]:
    """The fold that leaves each run out: the same for all runs of a prompt, where there are several prompts."""
    prompts = list(runs.prompts)
    kinds = list(dict.fromkeys(prompts))
    by_prompt = len(prompts) == len(runs) and len(kinds) >= FOLDS
    return [(kinds.index(prompts[row]) if by_prompt else row) % FOLDS for row in range(len(runs))]


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
    """Where the mean of OTHERS prompts lies nine times of ten, told from a sample of prompts, (P,): low and high.

    Student's interval for the difference of two means: prompts differ by many decibels.
    """
    degrees = len(values) - 1
    quantile = 1.645 * (1 + 1 / degrees + 1 / degrees**2)  # Student's t at 0.95 from the normal one, to 2 % from 2 on
    mean, half = float(values.mean()), quantile * float(values.std()) * math.sqrt(1 / len(values) + 1 / OTHERS)
    return [mean - half, mean + half]


def guarded(runs: Runs, made: Calibration, say: Callable[[str], None]) -> Calibration:
    """What was fitted, or plain reuse on the same schedule where that is better on prompts that were left out.

    Compares on at most GUARD_PROMPTS of them, by the PSNR of each that the prediction left there.

    Raises CalibrationError: the published method does harm, so that there is nothing to keep.
    """
    values = made.predicted.pop("each") if made.predicted else []
    if not values or len(made.computed_steps) == made.num_inference_steps:
        return made
    some = runs.first(GUARD_PROMPTS)
    values = values[: len(some)]
    cache = cache_of(plain_reuse(runs.record, made.computed_steps))
    plain = some.quality(cache)
    gain = float(torch.tensor(values).mean() - plain.mean())
    if gain >= -HARM:
        return made
    if made.method == "paper":  # has nothing to fall back to, and is there to be compared with
        if gain < -RUIN:
            raise CalibrationError(
                f"method 'paper' does harm on this solver: {-gain:.1f} dB below plain reuse on the same steps. Use "
                "method 'ertacache', or another scheduler"
            )
        say(f"method 'paper' loses {-gain:.1f} dB to plain reuse of the output on the same steps")
        return made
    say(f"the fitted coefficients lose {-gain:.1f} dB to plain reuse on prompts left out: plain reuse is kept")
    kept = plain_reuse(runs.record, made.computed_steps)
    return replace(kept, predicted=quality_of(plain))
