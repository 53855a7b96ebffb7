"""CogVideoX's schedulers on any grid: the stock ones where those are right, right where they are not."""

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from tiny_cogvideox import SCHEDULE, folder_module

from ertacache import solver
from ertacache.solver import StepCall, StepSignature

SCHEDULER = folder_module("scheduler")
STOCK = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
GOLDEN = json.loads((Path(__file__).parent / "vectors" / "cogvideox2b_ddim50.json").read_text())
SHAPE = (2, 3, 4, 4)


def scheduler_for(name: str = "ddim", **config):
    return SCHEDULER.any_grid_scheduler(name, STOCK[name](**{**SCHEDULE, **config}).config)


def noise(seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_arguments(scheduler, i: int, output, sample, old, generator) -> tuple[tuple, dict]:
    """Arguments of step i as CogVideoXPipeline gives them."""
    t = scheduler.timesteps[i]
    extra = {"generator": generator, "return_dict": False}
    if isinstance(scheduler, CogVideoXDPMScheduler):
        return (output, old, t, scheduler.timesteps[i - 1] if i else None, sample), extra
    return (output, t, sample), extra


def run(scheduler, velocity=lambda x, i: torch.sin(3 * x) + noise(100 + i), count: int | None = None) -> torch.Tensor:
    sample, old, generator = noise(0), None, torch.Generator().manual_seed(7)
    for i in range(count or len(scheduler.timesteps)):
        args, kwargs = step_arguments(scheduler, i, velocity(sample, i), sample, old, generator)
        sample, old = scheduler.step(*args, **kwargs)
    return sample


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("num_steps", [1, 2, 20, 25, 50, 100])
def test_bit_identical_to_stock_where_the_step_divides_1000(name, num_steps):
    stock, ours = STOCK[name](**SCHEDULE), scheduler_for(name)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(num_steps)
    assert torch.equal(ours.timesteps, stock.timesteps) and ours.timesteps.dtype == stock.timesteps.dtype
    assert torch.equal(run(ours), run(stock))


@pytest.mark.parametrize("change", [{"timestep_spacing": "leading"}, {"set_alpha_to_one": False}])
def test_bit_identical_to_stock_in_other_configurations(change):
    stock, ours = CogVideoXDDIMScheduler(**{**SCHEDULE, **change}), scheduler_for(**change)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(40)
    assert torch.equal(run(ours), run(stock))


def test_golden_grid_of_the_2b_model():
    scheduler = SCHEDULER.AnyGridDDIMScheduler(**GOLDEN["config"])
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == GOLDEN["ddim_timesteps_50"]
    bars = scheduler.alpha_bars(GOLDEN["ddim_timesteps_50"])
    assert bars.tolist() == pytest.approx(GOLDEN["alphas_cumprod_at_timesteps"], rel=1e-12, abs=0)


@pytest.mark.parametrize("num_steps", [28, 30, 50, 61])
def test_exact_on_a_model_that_knows_the_noise(num_steps):
    """With v = sqrt(a) eps - sqrt(1 - a) x0 each step lands on sqrt(a') x0 + sqrt(1 - a') eps, and the last on x0."""
    scheduler = scheduler_for()
    scheduler.set_timesteps(num_steps)
    assert len(scheduler.timesteps) == num_steps
    bars = [*scheduler.alpha_bars(scheduler.timesteps.tolist()).tolist(), 1.0]
    data, eps = noise(1).double(), noise(2).double()
    sample = bars[0] ** 0.5 * data + (1 - bars[0]) ** 0.5 * eps
    for i, t in enumerate(scheduler.timesteps):
        output = bars[i] ** 0.5 * eps - (1 - bars[i]) ** 0.5 * data
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
        expected = bars[i + 1] ** 0.5 * data + (1 - bars[i + 1]) ** 0.5 * eps
        assert torch.allclose(sample, expected, atol=1e-10), i
    assert torch.allclose(sample, data, atol=1e-10)


@pytest.mark.parametrize("num_steps", [28, 30])
def test_stock_is_off_by_one_there(num_steps):
    stock, ours = CogVideoXDDIMScheduler(**SCHEDULE), scheduler_for()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(num_steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert not torch.allclose(run(ours), run(stock), atol=1e-3)


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_grid_given_as_timesteps_changes_nothing(name):
    stock, ours = STOCK[name](**SCHEDULE), scheduler_for(name)
    stock.set_timesteps(50)
    ours.set_timesteps(timesteps=stock.timesteps.tolist())
    assert torch.equal(run(ours), run(stock))


def test_fractional_timesteps_interpolate_alpha_bars():
    scheduler = scheduler_for()
    table = scheduler.alphas_cumprod
    assert float(scheduler.alpha_bars([500.25])) == pytest.approx(float(0.75 * table[500] + 0.25 * table[501]))
    scheduler.set_timesteps(timesteps=[999.0, 500.25, 100.5])
    assert scheduler.timesteps.dtype == torch.float32
    result = run(scheduler)
    # numbers near the same grid lie near the same result
    whole = scheduler_for()
    whole.set_timesteps(timesteps=[999, 500, 100])
    assert torch.allclose(result, run(whole), atol=2e-2) and not torch.equal(result, run(whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "timesteps": [3, 2, 1]}, "exactly one"),
        ({"timesteps": []}, "one or more"),
        ({"timesteps": [1000.0, 2.0]}, "between 0 and 999"),
        ({"timesteps": [float("nan")]}, "between 0 and 999"),
        ({"timesteps": [5.0, 5.0]}, "must fall"),
        ({"timesteps": [5.0, 6.0]}, "must fall"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler_for().set_timesteps(**arguments)


def test_a_timestep_of_another_grid_is_refused():
    scheduler = scheduler_for()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(noise(0), 999, noise(0))
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="980 is not in the grid"):
        scheduler.step(noise(0), 980, noise(0))


def test_a_run_may_start_in_the_middle_as_video_to_video_does():
    stock, ours = CogVideoXDDIMScheduler(**SCHEDULE), scheduler_for()
    samples = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(50)
        sample = noise(0)
        for t in scheduler.timesteps[20:]:
            sample = scheduler.step(noise(int(t)), t, sample, return_dict=False)[0]
        samples.append(sample)
    assert torch.equal(*samples)


@pytest.mark.parametrize("name", STOCK)
def test_a_device_is_read_once_a_run(name, monkeypatch):
    """Off the host only the first timestep is looked up; the others follow in order, whatever they hold."""
    monkeypatch.setattr(SCHEDULER, "is_on_device", lambda timestep: True)
    stock, ours = STOCK[name](**SCHEDULE), scheduler_for(name)
    stock.set_timesteps(20)
    for _ in range(2):
        ours.set_timesteps(20)
        ours.timesteps = ours.timesteps.float()
        ours.timesteps[1:] = float("nan")
        assert torch.equal(run(ours), run(stock))


# -- what the method needs of a solver -------------------------------------------------------------------


def call_of(scheduler, args: tuple, kwargs: dict) -> StepCall:
    return StepSignature.of(inspect.signature(scheduler.step)).call(args, kwargs)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("num_steps", [28, 50])
def test_gain_is_the_numerical_derivative_and_the_target_is_hit(name, num_steps):
    scheduler = scheduler_for(name)
    scheduler.set_timesteps(num_steps)
    sample, old, generator = noise(0), None, torch.Generator().manual_seed(7)
    for i in range(num_steps):
        output = torch.sin(3 * sample) + noise(100 + i)
        args, kwargs = step_arguments(scheduler, i, output, sample, old, generator)
        call = call_of(scheduler, args, kwargs)
        state = generator.get_state()
        offset, gain = solver.affine_step(scheduler, call)
        assert torch.equal(generator.get_state(), state)  # the copies drew from clones
        assert gain == pytest.approx(numerical_derivative(scheduler, call), abs=2e-6), i

        wanted = noise(500 + i)  # any next latents: the drift target is the output that leads there
        target = (wanted - offset) / gain
        reached = solver.step_of_copy(scheduler, call.trial(target))
        assert torch.allclose(reached, wanted, atol=2e-4), i
        sample, old = scheduler.step(*args, **kwargs)
        assert torch.allclose(sample, offset + gain * output, atol=1e-5), i


def numerical_derivative(scheduler, call: StepCall, width: float = 0.5) -> float:
    """d x' / d o by central difference, in float64 and with the same noise."""

    def stepped(output):
        trial = call.trial(output.double())
        trial = replace(trial, arguments={**trial.arguments, call.signature.sample: call.sample})
        return solver.step_of_copy(scheduler, trial).double()

    difference = stepped(call.model_output + width) - stepped(call.model_output - width)
    return float((difference / (2 * width)).mean())


def test_ddim_gain_in_closed_form():
    """DDIM in v-prediction turns (x, v) by the angle between the grid's points: c = -sin(phi_i - phi_{i+1})."""
    scheduler = scheduler_for()
    scheduler.set_timesteps(30)
    angles = [math.acos(math.sqrt(a)) for a in scheduler.alpha_bars(scheduler.timesteps.tolist()).tolist()] + [0.0]
    for i in range(30):
        args, kwargs = step_arguments(scheduler, i, noise(1), noise(2), None, None)
        call = call_of(scheduler, args, kwargs)
        offset, gain = solver.affine_step(scheduler, call)
        assert gain == pytest.approx(-math.sin(angles[i] - angles[i + 1]), abs=1e-6)
        assert torch.allclose(offset, math.cos(angles[i] - angles[i + 1]) * noise(2), atol=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_copies_draw_the_noise_of_the_step_itself(seed, dtype):
    """From the caller's generator or the global one, in the sample's own dtype, which decides on the numbers."""
    scheduler = scheduler_for("dpm")
    scheduler.set_timesteps(10)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    torch.manual_seed(11)
    args, kwargs = step_arguments(scheduler, 4, noise(1), noise(0, dtype), noise(2), generator)
    offset, gain = solver.affine_step(scheduler, call_of(scheduler, args, kwargs))
    result = scheduler.step(*args, **kwargs)[0]
    assert torch.allclose(result.float(), offset + gain * noise(1), atol=1e-5)


def test_only_our_scheduler_says_that_its_timesteps_can_be_changed():
    assert solver.takes_timesteps(scheduler_for()) and solver.takes_timesteps(scheduler_for("dpm"))
    assert not solver.takes_timesteps(CogVideoXDDIMScheduler(**SCHEDULE))
