"""ERTACache on CogVideoX's pipeline, with random weights: batched and dynamic guidance, DDIM and DPM, any N."""

from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tiny_cogvideox import ARGUMENTS, NUM_STEPS, PROMPTS, SCHEDULE, call, cogvideox_pipeline, folder_module
from toys import plain_fields

import ertacache
from compare.rivals import FewerSteps, Multistep, TeaCache
from ertacache.attach import attached
from ertacache.errors import MismatchError, MismatchWarning
from ertacache.fit.published import adjust_timesteps
from ertacache.fit.record import Recording
from ertacache.solver import END_TIMESTEP


@pytest.fixture(scope="module")
def pipe() -> CogVideoXPipeline:
    return cogvideox_pipeline()


def calibrate(pipe, **changes) -> ertacache.Calibration:
    arguments = {**ARGUMENTS, "seeds": range(len(PROMPTS)), "effort": "fast", "progress": False, **changes}
    if not {"speedup", "threshold", "min_psnr"} & set(changes):
        arguments.setdefault("computed_steps", NUM_STEPS // 2)
    return ertacache.calibrate(pipe, PROMPTS, **arguments)


@pytest.fixture(scope="module")
def half(pipe) -> ertacache.Calibration:
    return calibrate(pipe)


# -- exactness and state ---------------------------------------------------------------------------------


def test_the_folder_scheduler_changes_nothing_at_the_default_steps():
    stock, ours = cogvideox_pipeline(None), cogvideox_pipeline()
    assert torch.equal(call(ours, num_inference_steps=50), call(stock, num_inference_steps=50))


@pytest.mark.parametrize("num_steps", [10, 28, 30, 50])
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_all_steps_computed_is_bit_identical(solver, num_steps):
    pipe = cogvideox_pipeline(solver)
    reference = call(pipe, num_inference_steps=num_steps)
    every = calibrate(pipe, computed_steps=num_steps, num_inference_steps=num_steps)
    with ertacache.apply(pipe, every):
        assert torch.equal(call(pipe, num_inference_steps=num_steps), reference)
    assert torch.equal(call(pipe, num_inference_steps=num_steps), reference)


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"use_dynamic_cfg": True}])
def test_all_steps_computed_is_bit_identical_with_any_guidance(pipe, changes):
    reference = call(pipe, **changes)
    with ertacache.apply(pipe, calibrate(pipe, computed_steps=NUM_STEPS, **changes)):
        assert torch.equal(call(pipe, **changes), reference)


def test_remove_leaves_the_pipeline_as_before(half):
    pipe = cogvideox_pipeline()
    reference, kind = call(pipe), type(pipe.transformer)
    before = set(pipe.__dict__), set(pipe.transformer.__dict__), set(pipe.scheduler.__dict__)
    with ertacache.apply(pipe, half):
        assert not torch.equal(call(pipe), reference)
    assert type(pipe.transformer) is kind
    assert (set(pipe.__dict__), set(pipe.transformer.__dict__), set(pipe.scheduler.__dict__)) == before
    assert torch.equal(call(pipe), reference)


@pytest.mark.parametrize("method", ["ertacache", "paper"])
def test_an_interrupted_run_leaves_nothing_behind(pipe, method):
    with ertacache.apply(pipe, calibrate(pipe, method=method)):
        expected = call(pipe)
        for last in range(0, NUM_STEPS, 2):

            def stop(_, step, *__, last=last):
                if step == last:
                    raise KeyboardInterrupt
                return {}

            with pytest.raises(KeyboardInterrupt):
                call(pipe, callback_on_step_end=stop)
            assert torch.equal(call(pipe), expected)

        def interrupt(running, step, _, state):
            running._interrupt = step == 3
            return state

        call(pipe, callback_on_step_end=interrupt)
        assert torch.equal(call(pipe), expected)


def test_a_batch_of_prompts_is_each_prompt_by_itself(pipe, half):
    prompts = ["a yellow square at the right", "a small purple triangle at the top left", "a cyan star at the bottom"]
    with ertacache.apply(pipe, half):
        together = call(pipe, prompts)
        for i, prompt in enumerate(prompts):
            assert torch.allclose(call(pipe, [prompt], seed=50 + i)[0], together[i], atol=1e-4)


def test_same_calibration_twice_and_in_any_micro_batch(pipe, half):
    assert calibrate(pipe) == half
    other = calibrate(pipe, micro_batch=2)
    assert other.computed_steps == half.computed_steps
    for one, two in zip(half.coefficients, other.coefficients, strict=True):
        assert one == pytest.approx(two, abs=1e-3)


# -- what runs and what does not -------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "batch"), [(3.0, 4), (1.0, 2)])
def test_one_call_a_computed_step_with_both_branches_in_it(pipe, guidance, batch):
    made = calibrate(pipe, guidance_scale=guidance)
    batches = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        with ertacache.apply(pipe, made) as applied:
            call(pipe, guidance_scale=guidance)
    finally:
        handle.remove()
    assert batches == [batch] * (NUM_STEPS // 2)
    assert (applied.computed_calls, applied.reused_calls) == (NUM_STEPS // 2, NUM_STEPS // 2)


def test_the_guided_output_is_what_is_predicted(pipe):
    """At the scheduler there is one history of guided outputs, of the latents' shape and not of the batch's."""
    recording = Recording()
    with attached(pipe, recording.begin):
        latents = call(pipe)
    assert len(recording.outputs) == NUM_STEPS
    assert all(o.shape == latents.shape and o.dtype == torch.float32 for o in recording.outputs)
    assert recording.takes_timesteps and recording.sigmas == []


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
@pytest.mark.parametrize("num_steps", [28, 30, 50])
@pytest.mark.parametrize("method", ["ertacache", "paper"])
def test_methods_end_to_end_at_any_step_count(solver, num_steps, method):
    """With the DPM solver every run draws the noise of the reference, so that they can be compared at all."""
    pipe = cogvideox_pipeline(solver)
    reference = call(pipe, num_inference_steps=num_steps)
    made = calibrate(pipe, method=method, computed_steps=num_steps // 2, num_inference_steps=num_steps)
    with ertacache.apply(pipe, made) as applied:
        result = call(pipe, num_inference_steps=num_steps)
    assert result.isfinite().all()
    assert applied.computed_calls == len(made.computed_steps) <= num_steps // 2
    assert float((result - reference).square().mean()) < float(reference.square().mean())


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"use_dynamic_cfg": True}])
def test_rectification_beats_plain_reuse_on_the_same_steps(pipe, changes):
    made = calibrate(pipe, **changes)
    plain = replace(made, **plain_fields(NUM_STEPS))
    reference = call(pipe, **changes)

    def error(calibration):
        with ertacache.apply(pipe, calibration):
            return float((call(pipe, **changes) - reference).square().mean())

    assert error(made) < 0.5 * error(plain)


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_half_precision(solver):
    """The pipeline guides in float32 and rounds the latents at every step."""
    pipe = cogvideox_pipeline(solver).to(torch.bfloat16)
    reference = call(pipe)
    with ertacache.apply(pipe, calibrate(pipe, computed_steps=NUM_STEPS)):
        assert torch.equal(call(pipe), reference)
    for method in ("ertacache", "paper"):
        with ertacache.apply(pipe, calibrate(pipe, method=method)):
            result = call(pipe)
        assert result.dtype == torch.bfloat16 and result.isfinite().all()


# -- the paper's grid ------------------------------------------------------------------------------------


def test_the_paper_runs_on_timesteps_adjusted_for_its_reused_steps(pipe):
    made = calibrate(pipe, method="paper")
    assert made.adjusted_sigmas is None and min(made.step_factors) < 1
    grid = [*made.timesteps, END_TIMESTEP]
    assert made.adjusted_timesteps == pytest.approx(adjust_timesteps(grid, made.step_factors)[:-1])
    assert made.adjusted_timesteps[0] == 999 and made.adjusted_timesteps != made.timesteps
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    try:
        with ertacache.apply(pipe, made):
            call(pipe)
            assert pipe.scheduler.timesteps.tolist() == pytest.approx(made.adjusted_timesteps, abs=1e-3)
    finally:
        handle.remove()
    assert seen == pytest.approx([made.adjusted_timesteps[i] for i in made.computed_steps], abs=1e-3)
    assert ertacache.Calibration.from_dict(made.to_dict()) == made


def test_without_reuse_the_paper_keeps_the_grid(pipe):
    made = calibrate(pipe, method="paper", threshold=1e-9)
    assert made.adjusted_timesteps == pytest.approx(made.timesteps)
    reference = call(pipe)
    with ertacache.apply(pipe, made):
        assert torch.equal(call(pipe), reference)


def test_on_the_stock_scheduler_the_paper_leaves_the_grid_alone():
    pipe = cogvideox_pipeline(None)
    made = calibrate(pipe, method="paper")
    assert made.adjusted_timesteps is None and made.step_factors == [1.0] * NUM_STEPS
    with ertacache.apply(pipe, made):
        assert call(pipe).isfinite().all()


def test_the_pipeline_takes_timesteps_of_ones_own(pipe):
    grid = [999.0, 700.5, 400.25, 100.0]
    assert call(pipe, timesteps=grid).isfinite().all()
    whole = call(cogvideox_pipeline(None), num_inference_steps=5)
    assert torch.equal(call(pipe, timesteps=[999, 799, 599, 399, 199]), whole)


# -- mismatches ------------------------------------------------------------------------------------------


def test_other_step_counts_grids_schedulers_and_models_are_refused(pipe, half):
    with ertacache.apply(pipe, half):
        with pytest.raises(MismatchError, match=r"12 steps.*for 10"):
            call(pipe, num_inference_steps=12)
        with pytest.raises(MismatchError, match="noise grid differs at step 3"):
            call(pipe, timesteps=[*half.timesteps[:3], 650, *half.timesteps[4:]])
    for solver in (None, "dpm"):
        with pytest.raises(MismatchError, match="is for the scheduler AnyGridDDIMScheduler"):
            ertacache.apply(cogvideox_pipeline(solver), half)
    other = cogvideox_pipeline()
    config = CogVideoXDDIMScheduler(**{**SCHEDULE, "snr_shift_scale": 1.0}).config
    other.scheduler = folder_module("scheduler").any_grid_scheduler("ddim", config)
    with pytest.raises(MismatchError, match="snr_shift_scale"):
        ertacache.apply(other, half)
    with pytest.raises(MismatchError, match="WanTransformer3DModel"):
        ertacache.apply(pipe, replace(half, model={**half.model, "class": "WanTransformer3DModel"}))


def test_other_guidance_and_size_warn_and_run(pipe, half):
    for change in ({"guidance_scale": 4.0}, {"height": 32, "width": 32}, {"num_frames": 17}):
        with pytest.warns(MismatchWarning), ertacache.apply(pipe, half):
            assert call(pipe, **change).isfinite().all()


def test_the_asked_guidance_scale_is_what_a_calibration_keeps(pipe):
    """Dynamic guidance leaves the last step's scale in the pipeline."""
    assert calibrate(pipe, use_dynamic_cfg=True).guidance_scale == ARGUMENTS["guidance_scale"]


# -- the folder's transformer, rivals, the real architecture ---------------------------------------------


def test_the_signal_is_what_the_first_block_normalises(pipe):
    signal = folder_module("transformer").modulated_input
    seen, wanted = [], []
    block = pipe.transformer.transformer_blocks[0].norm1
    handles = [
        pipe.transformer.register_forward_pre_hook(
            lambda module, _, kwargs: seen.append(signal(module, kwargs)), with_kwargs=True
        ),
        block.register_forward_hook(lambda _, __, output: wanted.append(output[0])),
    ]
    try:
        call(pipe, num_inference_steps=2)
    finally:
        for handle in handles:
            handle.remove()
    # the signal runs the block's norm itself, so that each step is seen twice
    assert len(seen) == 2 and all(torch.equal(s, wanted[2 * i + 1]) for i, s in enumerate(seen))


def test_rivals_run_on_it(pipe):
    signal = folder_module("transformer").modulated_input
    teacache = TeaCache(signal)
    teacache.prepare(pipe, [lambda **changes: call(pipe, PROMPTS[:1], **changes)], NUM_STEPS)
    reference = call(pipe)
    cases = [
        (teacache, {"threshold": 0.5}),
        (FewerSteps(), {"num_steps": 7}),
        (Multistep(), {"num_steps": 7, "solver": "dpmsolver++"}),
        (Multistep(), {"num_steps": 7, "solver": "unipc"}),
    ]
    for rival, setting in cases:
        with rival.attach(pipe, setting) as changes:
            assert call(pipe, **changes).isfinite().all(), rival.name
    assert torch.equal(call(pipe), reference)


def test_real_architecture_takes_and_gives_the_real_shapes():
    """CogVideoX-2B on the meta device: 30 layers, both branches of a 480x720 video of 49 frames, fp16."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel().half()
        latents = torch.empty(2, 13, 16, 60, 90, dtype=torch.float16)
        text = torch.empty(2, 226, 4096, dtype=torch.float16)
        arguments = {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "timestep": torch.full((2,), 999, dtype=torch.int64),
        }
        with torch.no_grad():
            signal = folder_module("transformer").modulated_input(transformer, arguments)
            output = transformer(**arguments, return_dict=False)[0]
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(1.7e9, rel=0.05)
    assert signal.shape == (2, 13 * 30 * 45, 1920)
    assert output.shape == latents.shape and output.dtype == torch.float16
