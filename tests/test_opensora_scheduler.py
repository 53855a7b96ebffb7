"""The rectified-flow sampler against golden vectors, and as the caching library uses it."""

import copy
import inspect
import itertools

import pytest
import torch
from tiny_opensora import info_of, load_vector, names_of

from ertacache.solver import StepSignature, affine_step, host_grid, identity

# isort: split
from opensora12.scheduler import FrameMask, RFlowScheduler

VIDEO = {"height": 240, "width": 426, "num_frames": 51}


def grid_cases():
    return [case for name in names_of("rflow_timesteps") for case in info_of(name)["cases"]]


@pytest.mark.parametrize("case", grid_cases())
def test_timesteps_are_exactly_the_original_ones(case):
    scheduler = RFlowScheduler(
        use_timestep_transform=case["use_timestep_transform"], use_discrete_timesteps=case["use_discrete_timesteps"]
    )
    sizes = {name: case[name] for name in VIDEO}
    scheduler.set_timesteps(case["steps"], **sizes, dtype=getattr(torch, case["args_dtype"].removeprefix("torch.")))
    dtype = getattr(torch, case["timesteps_dtype"].removeprefix("torch."))
    assert torch.equal(scheduler.timesteps, torch.tensor(case["timesteps"], dtype=dtype))
    if "as_bf16_int" in case:
        assert scheduler.timesteps.bfloat16().int().tolist() == case["as_bf16_int"]
    assert scheduler.timesteps[0] == 1000


def toy_velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The closed form that stands for the network in the vectors."""
    x, tau = x.float(), t / 1000
    return 0.7 * torch.sin(1.3 * x) - 0.4 * x * tau + 2.0 * y.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1) + 0.1 * tau**2


@pytest.mark.parametrize("name", names_of("rflow_loop"))
def test_loop_makes_what_the_original_makes(name):
    vector = load_vector(name)
    info, inputs = vector.info, vector.inputs
    scheduler = RFlowScheduler(use_timestep_transform=info["use_timestep_transform"])
    sizes = {key: inputs[key] for key in VIDEO}
    scheduler.set_timesteps(info["steps"], **sizes, dtype=inputs["height"].dtype)
    z = inputs["z"]
    y = torch.cat([inputs["y"], inputs["y_null"].expand_as(inputs["y"])])
    guidance = info["call_guidance_scale"] or info["cfg_scale"]
    frame_mask = FrameMask(inputs["mask"]) if "mask" in inputs else None
    for i, t in enumerate(scheduler.timesteps):
        if frame_mask:
            z, generated = frame_mask.before_step(z, t, inputs["step_noise"][i])
            assert torch.equal(generated.repeat(2, 1), vector.outputs["x_mask"][i])
        seen = vector.others[f"model_input_{i:02d}"]
        assert z.dtype == seen.dtype
        torch.testing.assert_close(z.repeat(2, 1, 1, 1, 1), seen, atol=1e-5, rtol=1e-5)
        cond, null = toy_velocity(z.repeat(2, 1, 1, 1, 1), t, y).chunk(2)
        following = scheduler.step(null + guidance * (cond - null), t, z, return_dict=False)[0]
        z = frame_mask.after_step(z, following, generated) if frame_mask else following
    assert torch.equal(scheduler.timesteps[:, None].expand_as(vector.outputs["timesteps"]), vector.outputs["timesteps"])
    vector.assert_close(z, "z")


# -- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [True, False])
def test_constant_velocity_leads_from_noise_to_data_whatever_the_grid(transform):
    """v = data - noise is constant along a straight line, so any grid arrives at the data."""
    scheduler = RFlowScheduler(use_timestep_transform=transform)
    scheduler.set_timesteps(7, **VIDEO)
    data, noise = torch.randn(2, 1, 4, 3, 2, 2)
    x = noise
    for t in scheduler.timesteps:
        torch.testing.assert_close(x, scheduler.add_noise(data, noise, t))
        x = scheduler.step(data - noise, t, x).prev_sample
    torch.testing.assert_close(x, data)
    with pytest.raises(ValueError, match="7 steps are taken"):
        scheduler.step(data, 0, x)


def test_larger_videos_spend_more_steps_near_noise():
    grids = []
    for height, frames in ((128, 1), (512, 1), (512, 51), (1024, 102)):
        scheduler = RFlowScheduler()
        scheduler.set_timesteps(10, height=height, width=height, num_frames=frames)
        grids.append(scheduler.timesteps)
    assert all(bool((a[1:] < b[1:]).all()) for a, b in itertools.pairwise(grids))
    torch.testing.assert_close(grids[1], torch.linspace(1000, 100, 10))  # 512 x 512, one frame: as they are


def test_sizes_may_be_numbers_or_tensors():
    first, second = RFlowScheduler(), RFlowScheduler()
    first.set_timesteps(5, **VIDEO, dtype=torch.bfloat16)
    tensors = {name: torch.full((3,), value, dtype=torch.bfloat16) for name, value in VIDEO.items()}
    second.set_timesteps(5, **tensors, dtype=torch.bfloat16)
    assert torch.equal(first.timesteps, second.timesteps)


@pytest.mark.parametrize("frames", [0, *range(2, 17)])
def test_lengths_whose_times_would_be_nan_are_refused(frames):
    with pytest.raises(ValueError, match=f"num_frames is {frames}: Open-Sora 1.2 makes 1 frame or 17"):
        RFlowScheduler().set_timesteps(30, height=240, width=426, num_frames=frames)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="needs width, num_frames"):
        RFlowScheduler().set_timesteps(30, height=240)
    with pytest.raises(ValueError, match="at least 1"):
        RFlowScheduler().set_timesteps(0, **VIDEO)
    with pytest.raises(ValueError, match="set_timesteps before step"):
        RFlowScheduler().step(torch.zeros(1), 1000, torch.zeros(1))


def test_run_may_begin_within_the_grid():
    scheduler = RFlowScheduler(use_timestep_transform=False)
    x = torch.zeros(1, 1, 1, 1, 1)
    for begin in (lambda: scheduler.set_begin_index(6), lambda: None):
        scheduler.set_timesteps(10)
        begin()
        made = scheduler.step(torch.ones_like(x), scheduler.timesteps[6], x).prev_sample
        assert scheduler.step_index == 7
        assert float(made) == pytest.approx(0.1)


# -- the caching library ---------------------------------------------------------------------------------


def test_library_reads_the_grid_and_the_gain():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(6, **VIDEO)
    timesteps, sigmas = host_grid(scheduler)
    assert len(sigmas) == 7 and sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas[:-1] == pytest.approx([t / 1000 for t in timesteps])
    sample = torch.randn(1, 4, 2, 2, 2)
    for i, t in enumerate(scheduler.timesteps):
        call = StepSignature.of(inspect.signature(scheduler.step)).call((torch.ones_like(sample), t, sample), {})
        offset, gain = affine_step(scheduler, call)
        assert gain == pytest.approx(sigmas[i] - sigmas[i + 1], abs=1e-6) and gain > 0
        torch.testing.assert_close(offset, sample)
        sample = scheduler.step(torch.ones_like(sample), t, sample, return_dict=False)[0]


def test_copies_go_their_own_way_and_settings_are_saved(tmp_path):
    scheduler = RFlowScheduler(transform_scale=0.5)
    scheduler.set_timesteps(4, **VIDEO)
    x = torch.zeros(1, 1, 1, 1, 1)
    duplicate = copy.deepcopy(scheduler)
    duplicate.step(x, duplicate.timesteps[0], x)
    assert scheduler.step_index is None and duplicate.step_index == 1
    scheduler.save_pretrained(tmp_path)
    assert identity(RFlowScheduler.from_pretrained(tmp_path)) == identity(scheduler)


def test_a_size_that_overflows_float16_is_refused():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(4, 252, 256, 17, dtype=torch.float16)  # 64512 pixels
    assert scheduler.timesteps.isfinite().all()
    with pytest.raises(ValueError, match="480x854 pixels overflow float16"):
        scheduler.set_timesteps(4, 480, 854, 51, dtype=torch.float16)


# -- the conditioning mask -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_mask_keeps_frames_and_lets_others_change_from_their_time_on(seed):
    torch.manual_seed(seed)
    mask = torch.rand(2, 5)
    mask[0, 0], mask[1, 1] = 0, 1
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(20, **VIDEO)
    frame_mask, start = FrameMask(mask), torch.randn(2, 4, 5, 2, 2)
    x = start
    for t in scheduler.timesteps:
        before, generated = frame_mask.before_step(x, t, torch.randn_like(x))
        assert torch.equal(generated, mask * 1000 >= t)
        x = frame_mask.after_step(before, before + 1, generated)
        kept = (mask * 1000 < t)[:, None, :, None, None].expand_as(x)
        assert torch.equal(x[kept], start[kept])
    assert torch.equal(x[0, :, 0], start[0, :, 0])  # mask 0: never touched
    torch.testing.assert_close(x[1, :, 1], start[1, :, 1] + 20)  # mask 1: stepped from the first, never noised anew
