"""Which steps to compute: dynamic programming on the Gram matrix, uniform, swap search.

A cache schedule is the increasing list of computed steps; step 0 is always among them. Every other step is
reused.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ertacache.errors import CalibrationError

Array = NDArray[np.float64]


def computed_steps_for(num_steps: int, speedup: float) -> int:
    """K = floor(N / speedup), at least 1."""
    if not speedup >= 1:
        raise CalibrationError(f"speedup is {speedup}: it must be 1 or more")
    return max(1, int(num_steps / speedup + 1e-9))


def check_computed_steps(num_steps: int, computed_steps: int) -> None:
    if not 1 <= computed_steps <= num_steps:
        raise CalibrationError(f"computed_steps is {computed_steps}: it must lie between 1 and {num_steps}")


def reuse_errors(gram: Array, gains: Array) -> Array:
    """E[j, k] = |c_k| ||o_k - o_j||: what it costs to reuse the output of step j at step k.

    Args:
        gram: (N, N), G[i, j] = <o_i, o_j>, averaged over prompts.
        gains: (N,), the c_k of solver.py.
    """
    squared_norms = np.diag(gram)
    squared = squared_norms[:, None] - 2 * gram + squared_norms[None, :]
    return np.abs(gains)[None, :] * np.sqrt(np.maximum(squared, 0))


def best_schedule(errors: Array, computed_steps: int) -> list[int]:
    """The K computed steps, step 0 among them, that minimise the summed error of the reused ones.

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


def swap_search(
    schedule: list[int],
    error_of: Callable[[list[int]], float],
    num_steps: int,
    budget: int,
) -> list[int]:
    """Move one computed step at a time to a neighbouring free place; keep a move that lowers the true error.

    Args:
        error_of: the final error of a schedule, measured on the calibration prompts.
        budget: how many schedules may be tried, the first one not counted.
    """
    best, best_error = list(schedule), error_of(schedule)
    tried = {tuple(schedule)}
    distance, turn = 1, 0
    while budget > 0:
        improved = False
        moves = neighbours(best, num_steps, distance)
        # go on where the last move was kept: those before it were tried and are hardly better by now
        for place in range(turn, turn + len(moves)):
            candidate = moves[place % len(moves)]
            if tuple(candidate) in tried or budget == 0:
                continue
            tried.add(tuple(candidate))
            budget -= 1
            error = error_of(candidate)
            if error < best_error:
                best, best_error, improved, turn = candidate, error, True, place
                break
        if not improved:
            distance += 1
            if distance >= num_steps:
                break
        else:
            distance = 1
    return best


def neighbours(schedule: list[int], num_steps: int, distance: int) -> list[list[int]]:
    """Schedules in which one computed step other than step 0 has moved by `distance` to a free place."""
    found = []
    for index in range(1, len(schedule)):
        for moved in (schedule[index] - distance, schedule[index] + distance):
            if 0 < moved < num_steps and moved not in schedule:
                found.append(sorted([*schedule[:index], moved, *schedule[index + 1 :]]))
    return found
