"""Weights of prompts in a least-squares problem, so that it serves a mean of decibels."""

import numpy as np

REWEIGHTINGS = 3  # rounds of least squares; the weights hardly move after the second
ERROR_FLOOR = 0.1  # q: share of the median error below which a prompt gains no more weight


def prompt_weights(errors: np.ndarray) -> np.ndarray:
    """1 / (E_p + q median E) of squared errors E (P,), with mean 1; all 1 where a prompt has no error at all."""
    softened = errors + ERROR_FLOOR * np.median(errors)
    if not softened.min() > 0:
        return np.ones(len(errors))
    weights = 1 / softened
    return weights / weights.mean()
