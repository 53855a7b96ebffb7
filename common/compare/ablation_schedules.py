"""Schedules for the ablation: uniform, and dynamic programming on the errors of plain reuse."""

import numpy as np

from ertacache.calibration import check_computed_steps
from ertacache.fit.record import Array


def reuse_errors(gram: Array, gains: Array) -> Array:
    """E[j, k] = |c_k| ||o_k - o_j||: what it costs to reuse the output of step j at step k.

    Args:
        gram: (N, N), G[i, j] = <o_i, o_j>, a mean over prompts and values (`fit.record.gram_matrix`).
        gains: (N,), the c_k of solver.py.
    """
    squared_norms = np.diag(gram)
    squared = squared_norms[:, None] - 2 * gram + squared_norms[None, :]
    return np.abs(gains)[None, :] * np.sqrt(np.maximum(squared, 0))


def best_schedule(errors: Array, computed_steps: int) -> list[int]:
    """Choose K computed steps, step 0 among them, that minimise the summed error of the reused ones.

    Dynamic programming over (number of computed steps so far, last computed step): O(N^2 K).

    Args:
        errors: (N, N), errors[j, k] for k > j; see `reuse_errors`.
    """
    num_steps = len(errors)
    check_computed_steps(num_steps, computed_steps)
    # segment[m, j]: computed at j, reused at j+1 .. m-1, where m is the next computed step or N; j >= m cannot be.
    # The axis that is searched comes last, where numpy searches several times as fast.
    segment = np.full((num_steps + 1, num_steps), np.inf)
    segment[1:] = np.cumsum(np.triu(errors, 1), axis=1).T
    segment[np.triu_indices(num_steps + 1, 0, num_steps)] = np.inf
    best = np.full(num_steps, np.inf)  # over schedules of `count` steps, by their last computed step
    best[0] = 0
    previous = np.zeros((computed_steps + 1, num_steps), dtype=np.int32)
    for count in range(2, computed_steps + 1):
        # the step before the last is at count - 2 or later, the last at count - 1 or later
        totals = segment[count - 1 : num_steps, count - 2 :] + best[count - 2 :]
        chosen = totals.argmin(axis=1)
        previous[count, count - 1 :] = chosen + count - 2
        best[: count - 1] = np.inf
        best[count - 1 :] = totals[np.arange(len(chosen)), chosen]
    last = int(np.argmin(best + segment[num_steps]))
    schedule = [last]
    for count in range(computed_steps, 1, -1):
        schedule.append(int(previous[count, schedule[-1]]))
    return schedule[::-1]


def uniform_schedule(num_steps: int, computed_steps: int) -> list[int]:
    """K steps spread evenly over the indices, starting at 0."""
    check_computed_steps(num_steps, computed_steps)
    return [i * num_steps // computed_steps for i in range(computed_steps)]
