"""The affine map of a scheduler step, for solvers with and without memory, leaving the scheduler as it was."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from toys import flow_solver

from ertacache import solver
from ertacache.solver import StepCall, StepSignature

pytestmark = pytest.mark.core
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: flow_solver(UniPCMultistepScheduler, flow_shift=3.0, solver_order=2),
    "dpm++": lambda: flow_solver(DPMSolverMultistepScheduler, flow_shift=3.0, algorithm_type="dpmsolver++"),
    "stochastic ddim": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
}


def call_of(scheduler, output, t, sample, **kwargs) -> StepCall:
    return StepSignature.of(inspect.signature(scheduler.step)).call((output, t, sample), kwargs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_affine_map_predicts_every_step(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    extra = {"eta": 0.7, "generator": torch.Generator().manual_seed(1)} if name == "stochastic ddim" else {}
    sample = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        output = torch.randn(sample.shape, generator=torch.Generator().manual_seed(10 + i))
        call = call_of(scheduler, output, t, sample, **extra)
        offset, gain = solver.affine_step(scheduler, call)
        sample = scheduler.step(output, t, sample, return_dict=False, **extra)[0]
        assert torch.allclose(sample, offset + gain * output, atol=2e-5), (name, i)


def test_euler_gain_is_the_sigma_increment():
    scheduler = SCHEDULERS["euler"]()
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 2, 2)
    call = call_of(scheduler, sample, scheduler.timesteps[0], sample)
    expected = float(scheduler.sigmas[1] - scheduler.sigmas[0])
    assert solver.affine_step(scheduler, call)[1] == pytest.approx(expected, abs=1e-6)


def test_unipc_gain_grows_in_mid_run():
    """The corrector and the second order make a model output count for more than its Euler step."""
    scheduler = SCHEDULERS["unipc"]()
    scheduler.set_timesteps(20)
    sample, ratios = torch.zeros(1, 4), []
    for i, t in enumerate(scheduler.timesteps):
        gain = solver.affine_step(scheduler, call_of(scheduler, torch.ones(1, 4), t, sample))[1]
        ratios.append(gain / float(scheduler.sigmas[i + 1] - scheduler.sigmas[i]))
        sample = scheduler.step(torch.ones(1, 4), t, sample, return_dict=False)[0]
    assert ratios[0] == pytest.approx(1.0, abs=1e-3) and 1.4 < ratios[10] < 2.2


def test_scheduler_with_another_signature():
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction")
    signature = StepSignature.of(inspect.signature(scheduler.step))
    call = signature.call((torch.ones(1), None, 999, None, torch.zeros(1)), {})
    assert call.sample.item() == 0 and call.model_output.item() == 1 and call.arguments["timestep"] == 999


@pytest.mark.parametrize("named", [(), ("sample",), ("model_output", "timestep", "sample")])
def test_a_call_with_another_output_is_otherwise_the_same(named):
    signature = StepSignature.of(inspect.signature(FlowMatchEulerDiscreteScheduler().step))
    given = {"model_output": torch.zeros(1), "timestep": 7.0, "sample": torch.ones(1)}
    positional = tuple(value for name, value in given.items() if name not in named)
    keywords = {name: given[name] for name in named} | {"return_dict": False}
    call = signature.call(positional, keywords)
    other = call.with_output(torch.full((1,), 5.0))
    assert (other.model_output.item(), other.sample.item(), other.arguments["timestep"]) == (5, 1, 7)
    assert other.arguments.keys() == call.arguments.keys() and other.arguments["return_dict"] is False
    assert call.model_output.item() == 0


def test_a_step_without_its_sample_is_refused():
    signature = StepSignature.of(inspect.signature(FlowMatchEulerDiscreteScheduler().step))
    with pytest.raises(TypeError, match="without 'sample'"):
        signature.call((torch.zeros(1), 1.0), {})


def test_host_grid_of_flux_matches_the_golden_schedule():
    cases = json.loads((Path(__file__).parent / "vectors" / "flux_schedule.json").read_text())["cases"]
    case = cases["1024x1024_28"]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    base = np.linspace(1, 1 / 28, 28)
    scheduler.set_timesteps(sigmas=base, mu=case["mu"])
    timesteps, sigmas = solver.host_grid(scheduler)
    assert sigmas == pytest.approx(case["sigmas"], abs=1e-6)
    assert timesteps == pytest.approx(case["timesteps"], abs=1e-3)
