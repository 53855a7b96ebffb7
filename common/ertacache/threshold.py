"""The paper's policy: reuse the kept residual while it is nearer than a threshold, else compute."""

import numpy as np

from ertacache.arrays import Array
from ertacache.policy import check_computed_steps


def threshold_schedule(distances: Array, threshold: float) -> list[int]:
    """The paper's policy: reuse the kept residual while it is closer than `threshold`, else compute.

    Args:
        distances: (N, N), distances[j, i] = |r_j - r_i|_1 / |r_i|_1 with residuals r = o - x.
    """
    schedule = [0]
    for step in range(1, len(distances)):
        if not distances[schedule[-1], step] < threshold:
            schedule.append(step)
    return schedule


def threshold_for(distances: Array, computed_steps: int) -> float:
    """The threshold at which `threshold_schedule` computes K steps, or the next smaller number it can reach.

    The number of computed steps falls with the threshold except for small ripples, so bisection finds it.
    """
    check_computed_steps(len(distances), computed_steps)
    low, high = 0.0, float(np.max(distances)) * 1.01 + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        if len(threshold_schedule(distances, middle)) <= computed_steps:
            high = middle
        else:
            low = middle
    return high
