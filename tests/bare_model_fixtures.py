"""A calibration, a bare model, and what the two must give together; a test file names this one in `pytest_plugins`."""

import pytest
import torch
from bare_models import STEPS, Pipeline, WanModel
from torch import Tensor

import ertacache


@pytest.fixture(scope="module")
def calibration() -> ertacache.Calibration:
    return ertacache.calibrate(
        Pipeline(), ["a", "b", "c"], seeds=range(3), computed_steps=5, num_inference_steps=STEPS, progress=False
    )


@pytest.fixture
def model() -> WanModel:
    return WanModel()


@pytest.fixture
def expected(calibration) -> Tensor:
    """What the attachment at the scheduler gives for prompt "x" and seed 7, with which that at the model must agree."""
    pipe = Pipeline()
    with ertacache.apply(pipe, calibration):
        return pipe("x", generator=torch.Generator().manual_seed(7))[0][0]
