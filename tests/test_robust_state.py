"""Whatever ends a run, the next one is as if it had never been: compared with a pipeline that did nothing else."""

import threading
from dataclasses import replace

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, NAMES, NUM_STEPS, call, expected, fitted, make, set_grid
from toys import plain_fields

import ertacache
from ertacache.errors import MismatchError, StateError

EVENTS = ("fails in the model", "keyboard interrupt", "interrupt flag", "abandoned loop", "other shape", "other steps")
COMPUTED = 3  # steps at which the model runs


class ModelFailureError(Exception):
    pass


def fail_in_model(pipe, name, at: int) -> None:
    """The model raises at its `at`-th call of the run."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) > at:
            raise ModelFailureError

    handle = pipe.transformer.register_forward_pre_hook(hook)
    try:
        with pytest.raises(ModelFailureError):
            call(pipe, name)
    finally:
        handle.remove()


def interrupt(pipe, name, at: int) -> None:
    def stop(_pipe, step, _timestep, state):
        if step == at:
            raise KeyboardInterrupt
        return state

    with pytest.raises(KeyboardInterrupt):
        call(pipe, name, callback_on_step_end=stop)


def set_flag(pipe, name, at: int) -> None:
    def stop(_pipe, step, _timestep, state):
        _pipe._interrupt = step >= at
        return state

    call(pipe, name, callback_on_step_end=stop)


def abandon(pipe, name, at: int) -> None:
    """A loop of one's own around scheduler and transformer, left half way."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
    interrupt(pipe, name, 0)
    handle.remove()
    latents = expected(name)[0]
    set_grid(pipe, name)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[: at + 1]:
            output = [pipe.transformer(*arguments, **keywords)[0] for arguments, keywords in seen][-1]
            pipe.scheduler.step(output.reshape(-1)[: latents.numel()].reshape(latents.shape), t, latents)


def other_shape(pipe, name, at: int) -> None:
    if name == "opensora":  # its grid moves with the size
        with pytest.raises(MismatchError, match="noise grid differs"):
            call(pipe, name, **MODELS[name].other_shape)
        return
    with pytest.warns(ertacache.MismatchWarning, match="latents are"):
        call(pipe, name, **MODELS[name].other_shape)


def other_steps(pipe, name, at: int) -> None:
    with pytest.raises(MismatchError, match=f"{NUM_STEPS + 1 + at} steps.*for {NUM_STEPS}"):
        call(pipe, name, num_inference_steps=NUM_STEPS + 1 + at)


def caches_of(attachment) -> list:
    """The caches of the runs that begin from now on."""
    caches, begin = [], attachment.begin
    attachment.begin = lambda scheduler: caches.append(begin(scheduler)) or caches[-1]
    return caches


HAPPEN = dict(zip(EVENTS, (fail_in_model, interrupt, set_flag, abandon, other_shape, other_steps), strict=True))


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_next_run_is_as_if_nothing_had_happened(name, event):
    pipe = make(name)
    with ertacache.apply(pipe, fitted(name)) as applied:
        caches = caches_of(applied._attachment)
        last = COMPUTED if event == "fails in the model" else NUM_STEPS - 1
        for at in range(last):
            HAPPEN[event](pipe, name, at)
            if event != "abandoned loop":
                assert applied._attachment.runs == {} and not any(cache.history for cache in caches)
            assert torch.equal(call(pipe, name), expected(name)[1])
    assert torch.equal(call(pipe, name), expected(name)[0])


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, COMPUTED - 1)), min_size=2, max_size=5))
@pytest.mark.parametrize("name", NAMES)
def test_random_sequences_of_events_leave_nothing_behind(name, events):
    pipe = make(name)
    with ertacache.apply(pipe, fitted(name)):
        for event, at in events:
            HAPPEN[event](pipe, name, at)
        assert torch.equal(call(pipe, name), expected(name)[1])
        batch = call(pipe, name, prompts=tiny_models.PROMPTS)
        torch.testing.assert_close(batch[:1], expected(name)[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(call(pipe, name), expected(name)[0])


@pytest.mark.parametrize("event", ["keyboard interrupt", "interrupt flag"])
@pytest.mark.parametrize("name", NAMES)
def test_two_pipelines_that_share_a_transformer(name, event):
    """The one without ERTACache gets the model's own answers, even after the other's run broke off at a reused step."""
    attached, other = make(name), make(name)
    other.transformer = attached.transformer
    with ertacache.apply(attached, fitted(name)):
        for at in range(NUM_STEPS - 1):
            HAPPEN[event](attached, name, at)
            assert torch.equal(call(other, name), expected(name)[0])
        with pytest.raises(StateError, match="attached already"):
            ertacache.apply(other, fitted(name))
        assert torch.equal(call(attached, name), expected(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_two_pipelines_that_share_a_scheduler_cannot_both_be_attached(name):
    one, two = make(name), make(name)
    two.scheduler = one.scheduler
    with ertacache.apply(one, fitted(name)):
        with pytest.raises(StateError, match="scheduler is attached already"):
            ertacache.apply(two, fitted(name))
        assert torch.equal(call(one, name), expected(name)[1])
    with ertacache.apply(two, fitted(name)):
        assert torch.equal(call(two, name), expected(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_each_with_a_pipeline(name):
    pipes = [make(name), make(name)]
    results: dict[int, list] = {0: [], 1: []}

    def work(index: int) -> None:
        with ertacache.apply(pipes[index], fitted(name)):
            results[index] += [call(pipes[index], name) for _ in range(4)]

    expected(name)
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results[0] + results[1]) == 8
    assert all(torch.equal(made, expected(name)[1]) for made in results[0] + results[1])


def test_a_call_from_another_thread_is_not_answered_from_the_run():
    pipe = make("flux")
    outputs = []

    def meanwhile(_pipe, step, _timestep, state):
        arguments = {
            "hidden_states": torch.ones(1, 16, 16),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "pooled_projections": torch.ones(1, 8),
            "encoder_hidden_states": torch.ones(1, 5, 12),
            "txt_ids": torch.zeros(5, 3),
            "img_ids": torch.zeros(16, 3),
            "return_dict": False,
        }
        if step == 0:  # the next step is a reused one
            with torch.no_grad():
                job = threading.Thread(target=lambda: outputs.append(pipe.transformer(**arguments)[0].detach()))
                job.start()
                job.join()
        return state

    with ertacache.apply(pipe, fitted("flux")):
        assert torch.equal(call(pipe, "flux", callback_on_step_end=meanwhile), expected("flux")[1])
    assert outputs[0].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_start_in_the_middle_of_the_grid_is_refused(name):
    """As in image-to-image, whatever the loop does to get there."""
    pipe = make(name)
    with ertacache.apply(pipe, fitted(name)):
        scheduler = pipe.scheduler
        latents = torch.zeros(expected(name)[0].shape)
        set_grid(pipe, name)
        with pytest.raises(StateError, match="every step of the grid"):
            scheduler.step(latents, scheduler.timesteps[2], latents)
        copied = scheduler.timesteps[2:].clone()  # nothing to know it by but its value
        with pytest.raises(StateError, match="every step of the grid"):
            scheduler.step(latents, copied[0], latents)
        if hasattr(scheduler, "set_begin_index"):
            set_grid(pipe, name)
            scheduler.set_begin_index(2)
            with pytest.raises(StateError, match=r"starts at step 2|every step of the grid"):
                scheduler.step(latents, scheduler.timesteps[2], latents)
            scheduler.set_begin_index(0)
        assert torch.equal(call(pipe, name), expected(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_called_past_its_call_is_refused(name):
    """Its forward called directly cannot be answered; a run that silently computes everything would be the result."""
    pipe = make(name)
    scheduler = pipe.scheduler
    with ertacache.apply(pipe, fitted(name)):
        set_grid(pipe, name)
        latents = torch.zeros(expected(name)[0].shape)
        with pytest.raises(StateError, match="without a call of the transformer"):
            scheduler.step(latents, scheduler.timesteps[0], latents)


@pytest.mark.parametrize("name", NAMES)
def test_all_steps_computed_is_exact(name):
    pipe = make(name)
    every = list(range(NUM_STEPS))
    with ertacache.apply(pipe, replace(fitted(name), computed_steps=every, **plain_fields(NUM_STEPS))):
        assert torch.equal(call(pipe, name), expected(name)[0])
