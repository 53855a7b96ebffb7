"""Least squares recovers what was planted, and serves every prompt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ertacache.fit import least_squares
from ertacache.fit.least_squares import RIDGE, fit_combination, grams, prompt_weights

pytestmark = pytest.mark.core


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.integers(0, 1000))
def test_least_squares_recovers_planted_coefficients(planted, seed):
    columns = [noise(seed + i, 5, 40) for i in range(len(planted))]
    target = sum(a * c for a, c in zip(planted, columns, strict=True))
    assert fit_combination(columns, target, ridge=1e-12) == pytest.approx(planted, abs=1e-4)


def test_a_ridge_shrinks_towards_the_plain_solution():
    columns = [noise(0, 1, 100), noise(1, 1, 100)]
    assert fit_combination(columns, 3 * columns[1], ridge=1e12) == pytest.approx([1.0, 0.0], abs=1e-6)


def test_a_ridge_is_relative_to_the_size_of_the_outputs():
    columns, target = [noise(0, 1, 100), noise(1, 1, 100)], noise(2, 1, 100)
    small, large = (fit_combination([s * c for c in columns], s * target, ridge=0.5) for s in (1e-3, 1e3))
    assert small == pytest.approx(large, rel=1e-5)
    assert small != pytest.approx(fit_combination(columns, target, ridge=0), abs=0.01)


def test_a_ridge_holds_what_outputs_share_as_little_as_what_they_differ_in():
    """Of outputs that nearly agree: what a ridge on the outputs themselves would take for nothing."""
    shared, own = 10 * noise(0, 4, 100), 0.01 * noise(1, 4, 100)
    columns, target = [shared + own, shared], shared + 3 * own
    assert fit_combination(columns, target, ridge=1e-2) == pytest.approx([3, -2], abs=0.1)


def test_the_ridge_problem_is_solved():
    """The gradient of |t - A a|^2 + ridge sum_i |D_i o|^2 (b_i - [i = 0])^2, a = D^T b, is zero."""
    columns, target = [noise(i, 1, 30) for i in range(3)], noise(3, 1, 30)
    a = np.array(fit_combination(columns, target, ridge=0.3))
    stacked = torch.cat(columns).double().numpy()
    d = np.array([[1, 0, 0], [1, -1, 0], [0, 1, -1]])
    b = np.linalg.solve(d.T, a)
    sizes = np.square(d @ stacked).sum(1)
    gradient = d @ stacked @ (stacked.T @ a - target[0].double().numpy()) + 0.3 * sizes * (b - [1, 0, 0])
    assert gradient == pytest.approx(np.zeros(3), abs=1e-4)


def test_one_hard_prompt_does_not_decide_for_the_others():
    column = noise(0, 9, 200)
    length = torch.full((9, 1), 1.1)
    length[4] = 3.0  # by plain least squares, one prompt in nine would pull the coefficient to 1.31
    target = length * column + 1e-3 * noise(1, 9, 200)
    assert fit_combination([column], target) == pytest.approx([1.1], abs=5e-3)


def test_equal_prompts_weigh_alike():
    column, target = noise(0, 1, 80), noise(1, 1, 80)
    together = fit_combination([column.repeat(5, 1)], target.repeat(5, 1))
    assert together == pytest.approx(fit_combination([column], target), rel=1e-6)


def test_weights_by_hand():
    """1 / (E + 0.1 median E), with mean 1."""
    wanted = 1 / (np.array([1.0, 2.0, 4.0]) + 0.2)
    assert prompt_weights(np.array([1.0, 2.0, 4.0])) == pytest.approx(wanted / wanted.mean())
    assert prompt_weights(np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_gram_matrices_are_those_of_each_prompt():
    one, other = noise(0, 3, 2, 5), noise(1, 3, 2, 5)
    made = grams([one, other])
    assert made.shape == (3, 2, 2) and made.dtype == np.float64
    assert made[1] == pytest.approx(
        np.array([[float((a[1] * b[1]).sum()) for b in (one, other)] for a in (one, other)]), rel=1e-6
    )


def test_identical_columns_stay_solvable():
    column = noise(0, 1, 50)
    fitted = fit_combination([column, column, column], 2 * column)
    assert sum(fitted) == pytest.approx(2 - RIDGE / (1 + RIDGE), abs=1e-6) and fitted[1:] == [0, 0]


def test_columns_of_zeros_keep_the_plain_solution():
    assert fit_combination([torch.zeros(2, 5), torch.zeros(2, 5)], noise(0, 2, 5)) == [1.0, 0.0]


def test_one_prompt_is_solved_once(monkeypatch):
    calls, solve = [], least_squares.solve_towards_plain
    monkeypatch.setattr(least_squares, "solve_towards_plain", lambda *a, **k: (calls.append(1), solve(*a, **k))[1])
    fit_combination([noise(0, 1, 9)], noise(1, 1, 9))
    assert len(calls) == 1
