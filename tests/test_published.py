"""The published method by hand: its threshold rule and its error model."""

import numpy as np
import pytest
import torch
from toys import ToyPipeline, curved

from compare.recorded import recorded_runs
from ertacache.fit.published import (
    fit_error_model,
    fit_published,
    residual_distances,
    threshold_for,
    threshold_schedule,
)
from ertacache.published import rectify

# -- the threshold -----------------------------------------------------------------------------------------


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
    reached = [len(threshold_schedule(distances, threshold_for(distances, count))) for count in (1, 5, 10, 20)]
    assert reached[0] == 1 and reached[1] in (4, 5) and reached[2] in (9, 10) and reached[3] == 20


def test_distances_by_hand():
    """Relative to the residual of the step that would reuse."""
    distances = residual_distances([torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])])
    assert distances[0, 1] == pytest.approx(2 / 3) and distances[1, 0] == pytest.approx(2.0)


# -- the error model ---------------------------------------------------------------------------------------


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_error_model_recovers_slope_and_intercept():
    reused = noise(3, 1000)
    error = 0.2 * reused + 0.05
    k, b = fit_error_model(reused, reused - error)
    assert (k / 4, b / 4 + 0.5) == pytest.approx((0.2, 0.05), abs=1e-5)  # sigma(z) ~ z / 4 + 1 / 2
    assert torch.allclose(rectify(reused, k, b), reused - error, atol=1e-5)


def test_the_error_model_of_a_constant_output_has_no_slope():
    k, b = fit_error_model(torch.full((10,), 2.0), torch.full((10,), 1.5))
    assert k == 0 and b / 4 + 0.5 == pytest.approx(0.5)


# -- the fit -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    return recorded_runs(ToyPipeline(curved), ["a", "b"], seeds=range(2), num_inference_steps=8).record


def test_computed_steps_are_left_as_they_are(record):
    fit = fit_published(record, schedule=[0, 3, 5])
    assert [pair is None for pair in fit.error_model] == [step in (0, 3, 5) for step in range(8)]
    assert [fit.step_factors[step] for step in (0, 3, 5)] == [1.0] * 3
    assert max(fit.step_factors[step] for step in (1, 2, 4, 6, 7)) < 1


def test_the_residual_that_is_reused_is_the_last_computed_one(record):
    """x + (o_j - x_j) of step j, the last computed one, against o."""
    fit = fit_published(record, schedule=[0, 3, 5])
    reused = record.latents[6] + record.outputs[5] - record.latents[5]
    assert fit.error_model[6] == pytest.approx(list(fit_error_model(reused, record.outputs[6])), rel=1e-4)


def test_parts_can_be_left_out(record):
    bare = fit_published(record, schedule=[0, 4], adjust=False, error_model=False)
    assert bare.step_factors == [1.0] * 8 and bare.adjusted_sigmas is None and bare.error_model == [None] * 8
