"""ERTACache on Open-Sora's pipeline and on its transformer alone, with random weights."""

import pytest
import torch
from opensora_folder import NUM_STEPS, PROMPTS, SMALL, call, folder_modules, pipeline
from tiny_opensora import FRAMES, LATENT, SIDE, generator
from torch import Tensor

import ertacache
from ertacache.errors import MismatchError, MismatchWarning

GUIDANCE = 7.0


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def calibrate(pipe, **changes) -> ertacache.Calibration:
    arguments = {**SMALL, "num_inference_steps": NUM_STEPS, "effort": "fast", "progress": False, **changes}
    arguments.setdefault("computed_steps", NUM_STEPS // 2)
    return ertacache.calibrate(pipe, PROMPTS, seeds=range(len(PROMPTS)), **arguments)


@pytest.fixture(scope="module")
def half(pipe) -> ertacache.Calibration:
    return calibrate(pipe)


def distance(made: Tensor, reference: Tensor) -> float:
    return float((made - reference).norm() / reference.norm())


# -- exactness and state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"num_frames": 34}, {"num_inference_steps": 5}])
def test_all_steps_computed_is_bit_identical(pipe, changes):
    reference = call(pipe, **changes)
    every = calibrate(pipe, **{"computed_steps": changes.get("num_inference_steps", NUM_STEPS), **changes})
    with ertacache.apply(pipe, every):
        assert torch.equal(call(pipe, **changes), reference)
    assert torch.equal(call(pipe, **changes), reference)


def test_half_of_the_steps_stay_nearer_than_half_as_many(pipe, half):
    reference = call(pipe)
    with ertacache.apply(pipe, half) as applied:
        cached = call(pipe)
    assert (applied.computed_calls, applied.reused_calls) == (NUM_STEPS // 2, NUM_STEPS // 2)
    assert distance(cached, reference) < 0.5 * distance(call(pipe, num_inference_steps=NUM_STEPS // 2), reference)


def test_remove_leaves_the_pipeline_as_before(half):
    pipe = pipeline()
    reference, kind = call(pipe), type(pipe.transformer)
    before = set(pipe.__dict__), set(pipe.transformer.__dict__), set(pipe.scheduler.__dict__)
    with ertacache.apply(pipe, half):
        assert not torch.equal(call(pipe), reference)
    assert type(pipe.transformer) is kind
    assert (set(pipe.__dict__), set(pipe.transformer.__dict__), set(pipe.scheduler.__dict__)) == before
    assert torch.equal(call(pipe), reference)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_leaves_nothing_behind(pipe, half):
    def interrupt(_, step, __, tensors):
        if step == NUM_STEPS // 2:
            raise Interrupted
        return tensors

    def stop(p, step, _, __):
        p._interrupt = step == NUM_STEPS // 2
        return {}

    with ertacache.apply(pipe, half):
        first = call(pipe)
        with pytest.raises(Interrupted):
            call(pipe, seed=3, callback_on_step_end=interrupt)
        assert torch.equal(call(pipe), first)
        call(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(call(pipe), first)


def test_a_batch_is_cached_as_its_videos_are(pipe, half):
    with ertacache.apply(pipe, half):
        one, other = call(pipe, "a blue cat", seed=1), call(pipe, "a dog runs", seed=2)
        generators = [generator(1), generator(2)]
        arguments = {**SMALL, "num_inference_steps": NUM_STEPS, "output_type": "latent"}
        both = pipe(["a blue cat", "a dog runs"], generator=generators, **arguments).frames
    torch.testing.assert_close(both, torch.cat([one, other]), atol=1e-3, rtol=1e-3)


def test_longer_videos_and_references_run_cached(pipe):
    """Every loop is a run of its own; frames that are kept go through the network too."""
    long = {"num_frames": 34, "num_loops": 2}
    reference = call(pipe, **long)
    with ertacache.apply(pipe, calibrate(pipe, num_frames=34, computed_steps=NUM_STEPS)):
        assert torch.equal(call(pipe, **long), reference)
    kept = {"references": [torch.zeros(3, 1, SIDE, SIDE)], "mask_strategy": "0"}
    reference = call(pipe, **kept)
    with ertacache.apply(pipe, calibrate(pipe, computed_steps=5)):
        cached = call(pipe, **kept)
    assert torch.equal(cached[:, :, :1], reference[:, :, :1]) and distance(cached, reference) < 0.5


def test_bfloat16_runs_and_repeats():
    pipe = pipeline().to(torch.bfloat16)
    with ertacache.apply(pipe, calibrate(pipe)):
        assert torch.equal(call(pipe), call(pipe))


# -- what does not belong together -----------------------------------------------------------------------


def test_another_number_of_steps_is_refused(pipe, half):
    with ertacache.apply(pipe, half), pytest.raises(MismatchError, match="has 6 steps, the calibration is for 8"):
        call(pipe, num_inference_steps=6)


@pytest.mark.parametrize("changes", [{"num_frames": 34}, {"num_frames": 1}, {"height": 32}])
def test_another_length_or_size_moves_the_times_and_is_refused(pipe, half, changes):
    with ertacache.apply(pipe, half), pytest.raises(MismatchError, match="noise grid differs"):
        call(pipe, **changes)


def test_another_guidance_scale_warns_and_none_at_all_is_refused(pipe, half):
    with ertacache.apply(pipe, half) as applied:
        with pytest.warns(MismatchWarning, match="guidance scale is 3"):
            cached = call(pipe, guidance_scale=3.0)
        assert applied.computed_calls == NUM_STEPS // 2
        with pytest.raises(MismatchError, match="guidance is of another kind"):
            call(pipe, guidance_scale=1.0)
    assert distance(cached, call(pipe, guidance_scale=3.0)) < 0.5


# -- the folder's transformer ----------------------------------------------------------------------------


def test_the_modulated_input_is_what_the_first_attention_sees(pipe):
    seen = []
    attention = pipe.transformer.spatial_blocks[0].attn
    hooks = [
        attention.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append({"x": args[0], "timestep": args[1], **kwargs}), with_kwargs=True
        ),
    ]
    call(pipe, num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    arguments, folded = seen
    with folder_modules() as modules, torch.no_grad():
        signal = modules["transformer"].modulated_input(pipe.transformer, arguments)
    torch.testing.assert_close(signal, folded.unflatten(0, (2, -1)).flatten(1, 2))


# -- the transformer alone, as the official loop calls it ------------------------------------------------


def official_loop(pipe, prompt: str, seed: int) -> Tensor:
    """The sampling loop of the official code: its scheduler is a list of times, the model is called with x_mask."""
    states, mask = pipe.encode_prompt([prompt])
    null = pipe.transformer.y_embedder.y_embedding[None, None]
    size = {"height": torch.tensor([float(SIDE)]), "width": torch.tensor([float(SIDE)]), "fps": torch.tensor([24.0])}
    arguments = {"y": torch.cat([states, null]), "mask": mask, **size}
    pipe.scheduler.set_timesteps(NUM_STEPS, height=SIDE, width=SIDE, num_frames=FRAMES)
    times = pipe.scheduler.timesteps
    z = torch.randn(1, 4, *LATENT, generator=generator(seed))
    for i, t in enumerate(times):
        x_mask = torch.ones(2, LATENT[0], dtype=torch.bool)
        with torch.no_grad():
            output = pipe.transformer(torch.cat([z, z]), t.expand(2), x_mask=x_mask, **arguments)
        cond, uncond = output.chunk(2, dim=1)[0].chunk(2)
        following = times[i + 1] if i + 1 < len(times) else torch.zeros(())
        z = z + (uncond + GUIDANCE * (cond - uncond)) * (t - following) / 1000
    return z


def test_the_transformer_alone_is_cached_as_in_the_pipeline(half):
    pipe = pipeline()
    prompt = "a blue cat aesthetic score: 6.5."
    torch.testing.assert_close(official_loop(pipe, prompt, 50), call(pipe), atol=1e-4, rtol=1e-4)
    with ertacache.apply(pipe, half):
        cached = call(pipe)
    with ertacache.apply(pipe.transformer, half) as applied:
        alone = official_loop(pipe, prompt, 50)
        assert torch.equal(official_loop(pipe, prompt, 50), alone)
    assert (applied.computed_calls, applied.reused_calls) == (NUM_STEPS, NUM_STEPS)
    torch.testing.assert_close(alone, cached, atol=1e-3, rtol=1e-3)
