"""The paper's timestep adjustment on numbers worked out by hand."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ertacache.fit.published import adjust_timesteps, adjustment_factor
from ertacache.published import MIN_FACTOR, timesteps_on


def test_factor_by_hand():
    assert adjustment_factor(0.25, 1.0) == 0.75
    assert adjustment_factor(2.0, 1.0) == MIN_FACTOR  # never a zero step
    assert adjustment_factor(0.0, 0.0) == 1.0


def test_uniform_grid_by_hand():
    # dt_c = 0.25; half of it at step 1; then what is left, 0.625, over two steps
    adjusted = adjust_timesteps([1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.5, 1.0, 1.0])
    assert adjusted == pytest.approx([1.0, 0.75, 0.625, 0.3125, 0.0])


def test_computing_everything_keeps_the_grid():
    grid = [1.0, 0.9, 0.6, 0.1, 0.0]
    assert adjust_timesteps(grid, [1.0] * 4) == pytest.approx(grid)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(MIN_FACTOR, 1.0), min_size=2, max_size=40))
def test_adjusted_grid_falls_strictly_to_the_same_end(factors):
    count = len(factors)
    adjusted = adjust_timesteps([1 - i / count for i in range(count + 1)], factors)
    assert adjusted[0] == 1.0 and adjusted[-1] == 0.0
    assert all(a > b for a, b in pairwise(adjusted))


def test_timesteps_are_interpolated_between_the_original_pairs():
    sigmas, timesteps = [1.0, 0.5, 0.2, 0.0], [1000.0, 500.0, 200.0]
    assert timesteps_on([1.0, 0.6, 0.1, 0.0], sigmas, timesteps) == pytest.approx([1000.0, 600.0, 100.0])
    assert timesteps_on(sigmas, sigmas, timesteps) == pytest.approx(timesteps)
