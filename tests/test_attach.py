"""The run state: exactness, reuse errors known by hand, interruptions, mismatches, removal."""

import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toys import ToyPipeline, curved, linear_in_sigma, plain_fields

import ertacache
from ertacache.checks import check_grid
from ertacache.errors import MismatchError, MismatchWarning, StateError

STEPS = 8


def run(pipe, num_inference_steps=STEPS, prompts=("a", "b")):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(list(prompts), generator=generators, num_inference_steps=num_inference_steps, output_type="latent")[0]


def plain_reuse(pipe, computed_steps, steps=STEPS):
    """A calibration that reuses the last output as it is."""
    made = ertacache.calibrate(
        pipe, ["p"], computed_steps=len(computed_steps), num_inference_steps=steps, progress=False
    )
    return replace(made, computed_steps=computed_steps, **plain_fields(steps))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_all_steps_computed_is_bit_identical(guidance):
    pipe = ToyPipeline(curved, guidance_scale=guidance)
    reference = run(pipe)
    calibration = ertacache.calibrate(pipe, ["p", "q"], computed_steps=STEPS, num_inference_steps=STEPS, progress=False)
    with ertacache.apply(pipe, calibration):
        assert torch.equal(run(pipe), reference)


def test_remove_leaves_the_pipeline_as_before():
    pipe = ToyPipeline(curved)
    reference, kind = run(pipe), type(pipe.transformer)
    before = set(pipe.__dict__), set(pipe.transformer.__dict__), set(pipe.scheduler.__dict__)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 3])):
        assert not torch.equal(run(pipe), reference)
    assert type(pipe.transformer) is kind
    assert (set(pipe.__dict__), set(pipe.transformer.__dict__), set(pipe.scheduler.__dict__)) == before
    assert torch.equal(run(pipe), reference)


def test_reuse_error_is_the_one_known_by_hand():
    """v = sigma: reusing step j at step k is wrong by (sigma_{k+1} - sigma_k)(sigma_j - sigma_k)."""
    pipe = ToyPipeline(linear_in_sigma)
    reference = run(pipe)
    computed = [0, 3, 5]
    with ertacache.apply(pipe, plain_reuse(pipe, computed)):
        difference = run(pipe) - reference
    sigmas = pipe.scheduler.sigmas.tolist()
    expected, last = 0.0, 0
    for k in range(STEPS):
        last = k if k in computed else last
        expected += (sigmas[k + 1] - sigmas[k]) * (sigmas[last] - sigmas[k])
    assert torch.allclose(difference, torch.full_like(difference, expected), atol=1e-5)


def test_transformer_runs_on_computed_steps_only_for_both_branches():
    pipe = ToyPipeline(curved, guidance_scale=3.0)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 3, 5])) as applied:
        pipe.transformer.calls = 0
        run(pipe)
    assert pipe.transformer.calls == 6
    assert (applied.computed_calls, applied.reused_calls) == (6, 10)


def test_guidance_at_the_scheduler_equals_guidance_of_reused_branches():
    """Linear guidance of two reused branches is the reused guided output."""
    pipe = ToyPipeline(linear_in_sigma, guidance_scale=3.0)
    reference = run(pipe)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])):
        guided = run(pipe) - reference
    scale = 0.5 + 3.0 * 0.5  # u = v / 2
    single = ToyPipeline(linear_in_sigma)
    plain = run(single)
    with ertacache.apply(single, plain_reuse(single, [0, 4])):
        assert torch.allclose(guided, scale * (run(single) - plain), atol=1e-5)


def test_a_step_looks_at_no_signature(monkeypatch):
    """Binding one takes longer than the rest of a reused step."""
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])):
        expected = run(pipe)
        monkeypatch.setattr(inspect, "signature", None)
        monkeypatch.setattr(inspect.Signature, "bind", None)
        assert torch.equal(run(pipe), expected)


def test_interrupted_run_leaves_nothing_behind():
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 3, 5])
    with ertacache.apply(pipe, calibration):
        expected = run(pipe)
        for step in range(STEPS):
            pipe.interrupt_at = step
            with pytest.raises(KeyboardInterrupt):
                run(pipe)
            pipe.interrupt_at = None
            assert torch.equal(run(pipe), expected)
        assert run(pipe, prompts=("a", "b", "c")).shape[0] == 3


def test_two_pipelines_share_nothing():
    one, two = ToyPipeline(curved), ToyPipeline(curved)
    reference = run(two)
    with ertacache.apply(one, plain_reuse(one, [0, 4])):
        run(one)
        assert torch.equal(run(two), reference)


def test_cached_tensors_are_dropped_after_the_run():
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])) as applied:
        run(pipe)
        assert not applied._attachment.controller.history


def test_other_step_count_is_refused_and_named():
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])), pytest.raises(MismatchError, match=r"10 steps.*for 8"):
        run(pipe, num_inference_steps=10)


def test_other_grid_is_refused():
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 4])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.scheduler.set_shift(2.0)
    with ertacache.apply(pipe, calibration), pytest.raises(MismatchError, match="noise grid differs at step"):
        run(pipe)


@pytest.mark.parametrize(("place", "step"), [(0, 0), (7, 7), (8, 0), (15, 7), (16, 8)])  # 8 timesteps, 9 sigmas
def test_the_step_at_which_the_grid_differs_is_named(place, step):
    calibration = plain_reuse(ToyPipeline(curved), [0, 4])
    grid = [*calibration.timesteps, *calibration.sigmas]
    grid[place] += 0.5
    with pytest.raises(MismatchError, match=f"differs at step {step} "):
        check_grid(calibration, grid[:8], grid[8:])


def test_other_scheduler_and_model_class_are_refused():
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 4])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(MismatchError, match=r"scheduler's shift is 3\.0"):
        ertacache.apply(pipe, calibration)
    other = replace(calibration, model={**calibration.model, "class": "WanTransformer3DModel"})
    with pytest.raises(MismatchError, match="WanTransformer3DModel"):
        ertacache.apply(ToyPipeline(curved), other)


@pytest.mark.parametrize("change", ["guidance", "weights", "shape"])
def test_what_costs_only_quality_warns_and_runs(change):
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 4])
    if change == "guidance":
        pipe.guidance_scale = 2.0
    elif change == "weights":
        pipe.transformer.weight.data += 1
    else:
        pipe.side = 6
    with pytest.warns(MismatchWarning), ertacache.apply(pipe, calibration):
        assert run(pipe).isfinite().all()


def test_matching_run_does_not_warn():
    pipe = ToyPipeline(curved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])):
            run(pipe, prompts=("a",))


def test_replaced_scheduler_is_never_silently_uncached():
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        with pytest.raises(StateError, match="replaced"):
            run(pipe)


def test_start_in_the_middle_of_the_grid_is_refused():
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])):
        pipe.scheduler.set_timesteps(STEPS)
        t = pipe.scheduler.timesteps[2]
        with pytest.raises(StateError, match="every step of the grid"):
            pipe.scheduler.step(torch.zeros(1, 3), t, torch.zeros(1, 3))


def test_pipeline_without_a_transformer_is_refused():
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 4])
    del pipe.transformer
    with pytest.raises(MismatchError, match="no transformer"):
        ertacache.apply(pipe, calibration)
