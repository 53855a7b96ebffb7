"""Closed forms: least squares recovers what was planted, combinations, the paper's error model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ertacache import error_model, rectification


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.integers(0, 1000))
def test_least_squares_recovers_planted_coefficients(planted, seed):
    columns = [noise(seed + i, 5, 40) for i in range(len(planted))]
    target = sum(a * c for a, c in zip(planted, columns, strict=True))
    assert rectification.fit_rectification(columns, target, ridge=1e-12) == pytest.approx(planted, abs=1e-4)


def test_ridge_shrinks_towards_the_plain_solution():
    columns = [noise(0, 1, 100), noise(1, 1, 100)]
    fitted = rectification.fit_rectification(columns, 3 * columns[1], ridge=1e12)
    assert fitted == pytest.approx([1.0, 0.0], abs=1e-6)


def test_one_hard_prompt_does_not_decide_for_the_others():
    column = noise(0, 9, 200)
    length = torch.full((9, 1), 1.1)
    length[4] = 3.0  # by plain least squares, one prompt in nine would pull the coefficient to 1.31
    target = length * column + 1e-3 * noise(1, 9, 200)
    assert rectification.fit_rectification([column], target) == pytest.approx([1.1], abs=5e-3)


def test_equal_prompts_weigh_alike():
    column, target = noise(0, 1, 80), noise(1, 1, 80)
    alone = rectification.fit_rectification([column], target)
    together = rectification.fit_rectification([column.repeat(5, 1)], target.repeat(5, 1))
    assert together == pytest.approx(alone, rel=1e-6)


def test_identical_columns_stay_solvable():
    column = noise(0, 1, 50)
    fitted = rectification.fit_rectification([column, column, column], 2 * column)
    assert np.isfinite(fitted).all() and sum(fitted) == pytest.approx(2.0, abs=1e-3)


def test_combine_by_hand_and_in_the_outputs_dtype():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert torch.equal(rectification.combine([a, b], [2.0, -0.1]), torch.tensor([1.0, 2.0]))
    half = rectification.combine([a.bfloat16(), b.bfloat16()], [1.5, 0.5])
    assert half.dtype == torch.bfloat16 and half.float().tolist() == [6.5, 13.0]


def test_the_plain_combination_is_the_tensor_itself():
    a = torch.ones(3)
    assert rectification.combine([a, a], [1.0]) is a


def test_drift_target_puts_the_state_back():
    offset, gain, reference = noise(0, 7), -0.3, noise(1, 7)
    target = rectification.drift_target(reference, offset, gain)
    assert torch.allclose(offset + gain * target, reference, atol=1e-6)


def test_error_model_recovers_slope_and_intercept():
    reused = noise(3, 1000)
    error = 0.2 * reused + 0.05
    k, b = error_model.fit_error_model(reused, reused - error)
    assert (k / 4, b / 4 + 0.5) == pytest.approx((0.2, 0.05), abs=1e-5)  # sigma(z) ~ z / 4 + 1 / 2
    assert torch.allclose(error_model.rectify(reused, k, b), reused - error, atol=1e-5)


def test_error_model_of_a_constant_output_has_no_slope():
    reused = torch.full((10,), 2.0)
    k, b = error_model.fit_error_model(reused, torch.full((10,), 1.5))
    assert k == 0 and b / 4 + 0.5 == pytest.approx(0.5)
