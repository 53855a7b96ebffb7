"""Computed steps: how many a speed-up asks for, and the search that moves them one by one to lower the true error.

A cache schedule is the increasing list of computed steps; step 0 is always among them. Every other step is
reused. Ours is chosen in schedule_search.py.
"""

from collections.abc import Callable

from ertacache.errors import CalibrationError


def computed_steps_for(num_steps: int, speedup: float) -> int:
    """K = floor(N / speedup), at least 1. Raises CalibrationError for a speed-up below 1."""
    if not speedup >= 1:
        raise CalibrationError(f"speedup is {speedup}: it must be 1 or more")
    return max(1, int(num_steps / speedup + 1e-9))


def check_computed_steps(num_steps: int, computed_steps: int) -> None:
    """Raise CalibrationError unless 1 <= K <= N."""
    if not 1 <= computed_steps <= num_steps:
        raise CalibrationError(f"computed_steps is {computed_steps}: it must lie between 1 and {num_steps}")


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
