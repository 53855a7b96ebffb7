"""Cache schedules: dynamic programming against brute force, the paper's threshold rule, the swap search."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import ablation_schedules
from ertacache.calibration import computed_steps_for
from ertacache.errors import CalibrationError
from ertacache.fit.published import threshold_for, threshold_schedule
from ertacache.fit.schedule import swap_search


def cost_of(schedule: list[int], errors: np.ndarray) -> float:
    """Summed error of the reused steps, written down directly."""
    total, last = 0.0, 0
    for step in range(len(errors)):
        last = step if step in schedule else last
        total += 0.0 if step in schedule else errors[last, step]
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000), st.data())
def test_dynamic_programming_equals_brute_force(num_steps, seed, data):
    errors = np.random.default_rng(seed).random((num_steps, num_steps))
    count = data.draw(st.integers(1, num_steps))
    found = ablation_schedules.best_schedule(errors, count)
    rivals = [[0, *rest] for rest in combinations(range(1, num_steps), count - 1)]
    assert found[0] == 0 and len(found) == len(set(found)) == count and found == sorted(found)
    assert cost_of(found, errors) == pytest.approx(min(cost_of(r, errors) for r in rivals))


def test_reuse_errors_are_distances_times_gains():
    outputs = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    errors = ablation_schedules.reuse_errors(outputs @ outputs.T, np.array([0.5, -1.0, 2.0]))
    assert errors[0, 1] == pytest.approx(1.0 * np.sqrt(5))  # |c_1| |o_1 - o_0|
    assert errors[1, 2] == pytest.approx(2.0 * np.sqrt(9 + 4))
    assert errors[0, 0] == 0


def test_threshold_schedule_keeps_the_last_computed_residual():
    position = np.array([0.0, 0.4, 0.8, 1.2, 1.3, 1.4])
    distances = np.abs(position[:, None] - position[None, :])
    # from step 0: 0.4 is near, 0.8 is not; from step 2: 0.4, 0.5 near, 0.6 not
    assert threshold_schedule(distances, 0.55) == [0, 2, 5]
    assert threshold_schedule(distances, 0.0) == [0, 1, 2, 3, 4, 5]
    assert threshold_schedule(distances, 10.0) == [0]


def test_threshold_for_reaches_the_asked_number():
    position = np.cumsum(np.linspace(1, 0.1, 20))
    distances = np.abs(position[:, None] - position[None, :])
    for count in (1, 5, 10, 20):
        assert len(threshold_schedule(distances, threshold_for(distances, count))) <= count
    assert len(threshold_schedule(distances, threshold_for(distances, 10))) in (9, 10)


def test_uniform_schedule():
    assert ablation_schedules.uniform_schedule(10, 5) == [0, 2, 4, 6, 8]
    assert ablation_schedules.uniform_schedule(7, 7) == list(range(7))


def test_speedup_is_floored():
    assert computed_steps_for(28, 2.0) == 14
    assert computed_steps_for(28, 2.5) == 11
    assert computed_steps_for(28, 100) == 1
    with pytest.raises(CalibrationError, match=r"speedup is 0\.5"):
        computed_steps_for(28, 0.5)


def test_swap_search_finds_the_better_schedule_within_its_budget():
    wanted = [0, 2, 5, 9]
    asked = []

    def error_of(schedule):
        asked.append(schedule)
        return sum(abs(a - b) for a, b in zip(schedule, wanted, strict=True))

    assert swap_search([0, 1, 2, 3], error_of, num_steps=10, budget=200) == wanted
    asked.clear()
    swap_search([0, 1, 2, 3], error_of, num_steps=10, budget=5)
    assert len(asked) == 6  # the start and the budget


@pytest.mark.parametrize("count", [0, 11, -1])
def test_impossible_counts_are_refused(count):
    with pytest.raises(CalibrationError, match="between 1 and 10"):
        ablation_schedules.best_schedule(np.ones((10, 10)), count)
