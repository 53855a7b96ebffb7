"""The run state: exactness, reuse errors known by hand, interruptions, mismatches, removal."""

import copy
import inspect
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from toys import ToyPipeline, ToyTransformer, curved, linear_in_sigma, plain_fields

import ertacache
from ertacache.attach import CachedTransformer, attached, place_in_grid
from ertacache.checks import check_grid
from ertacache.errors import MismatchError, MismatchWarning, NumericsError, StateError
from ertacache.replay import cache_of

pytestmark = pytest.mark.core
STEPS = 8
LIBRARY = str(Path(ertacache.__file__).parent)


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
        assert type(pipe.transformer) is kind  # while attached, too
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


def fitted(pipe, computed_steps=4):
    """A calibration that combines several outputs."""
    return ertacache.calibrate(
        pipe, ["p", "q"], seeds=(0, 1), computed_steps=computed_steps, num_inference_steps=STEPS, progress=False
    )


def calls_of_each_step(pipe) -> list[list[str]]:
    """Files of the library's functions that each step calls, from the transformer's call through the scheduler's."""
    latents, steps = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        files: list[str] = []

        def entered(frame, event, _, files=files):
            if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
                files.append(frame.f_code.co_filename)

        timestep = t.expand(1)
        sys.setprofile(entered)
        try:
            output = pipe.transformer(hidden_states=latents, timestep=timestep, return_dict=False)[0]
            latents = pipe.scheduler.step(output, t, latents, return_dict=False)[0]
        finally:
            sys.setprofile(None)
        steps.append(files)
    return steps


def test_a_reused_step_passes_through_four_files_in_fifteen_calls():
    """But for the last step, at which the run ends."""
    pipe = ToyPipeline(curved)
    calibration = fitted(pipe)
    assert max(map(len, calibration.coefficients)) > 1
    with ertacache.apply(pipe, calibration):
        steps = calls_of_each_step(pipe)
    reused = [files for step, files in enumerate(steps[:-1]) if step not in calibration.computed_steps]
    assert len(reused) >= 3
    for files in reused:
        assert 0 < len(files) <= 15 and len(set(files)) <= 4, files
    assert calls_of_each_step(pipe) == [[]] * STEPS  # and none at all once it is removed


# -- copies and threads ----------------------------------------------------------------------------------


def own_copy(pipe):
    """A copy that shares the models, with a scheduler of its own, as servers make one for each request."""
    duplicate = copy.copy(pipe)
    duplicate.scheduler = copy.deepcopy(pipe.scheduler)
    return duplicate


def request(pipe, seed: int):
    return pipe("p", generator=torch.Generator().manual_seed(seed), num_inference_steps=STEPS, output_type="latent")[0]


def test_a_copy_with_a_scheduler_of_its_own_is_cached_too():
    pipe = ToyPipeline(curved)
    plain = request(pipe, 1)
    with ertacache.apply(pipe, fitted(pipe)) as applied:
        expected = request(pipe, 1)
        duplicate = own_copy(pipe)
        calls = applied.computed_calls, applied.reused_calls
        assert torch.equal(request(duplicate, 1), expected) and not torch.equal(expected, plain)
        assert (applied.computed_calls, applied.reused_calls) == tuple(2 * count for count in calls)
        assert torch.equal(request(pipe, 1), expected)
        assert pipe.scheduler.step_index == duplicate.scheduler.step_index == STEPS


def test_eight_threads_at_a_time_are_each_as_if_alone():
    pipe = ToyPipeline(curved, guidance_scale=3.0)
    made, seeds = {}, range(8)
    with ertacache.apply(pipe, fitted(pipe)):
        alone = {seed: request(pipe, seed) for seed in seeds}
        together = threading.Barrier(len(seeds))

        def work(seed: int) -> None:
            duplicate = own_copy(pipe)
            together.wait()
            made[seed] = [request(duplicate, seed) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(made) == set(seeds)
    assert all(torch.equal(result, alone[seed]) for seed in seeds for result in made[seed])


def test_a_copy_that_outlives_the_attachment_is_uncached_and_can_be_attached():
    pipe = ToyPipeline(curved)
    plain, calibration = request(pipe, 1), fitted(pipe)
    with ertacache.apply(pipe, calibration):
        expected = request(pipe, 1)
        one, two, three = (own_copy(pipe) for _ in range(3))
    assert torch.equal(request(one, 1), plain) and "step" not in vars(one.scheduler)
    with ertacache.apply(two, calibration):
        assert torch.equal(request(two, 1), expected)
        ertacache.remove(three)  # of an attachment that is gone: the new one stays
        assert torch.equal(request(two, 1), expected)
    for other in (pipe, one, two, three):
        assert torch.equal(request(other, 1), plain)
        ertacache.remove(other)
        assert type(other) is ToyPipeline and "_ertacache" not in vars(other)


def test_removal_in_the_middle_of_a_run_is_no_silent_zero():
    """A reused step's placeholder must not reach a scheduler that nothing is attached to any more."""
    pipe = ToyPipeline(curved)
    ertacache.apply(pipe, plain_reuse(pipe, [0]))
    duplicate, latents = own_copy(pipe), torch.ones(1, 3, 4, 4)
    scheduler = duplicate.scheduler
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps[:2]:
        output = pipe.transformer(latents, t.expand(1))[0]
        if output.abs().max() == 0:
            ertacache.remove(pipe)
            with pytest.raises(StateError, match="set_timesteps first"):
                scheduler.step(output, t, latents)
            return
        latents = scheduler.step(output, t, latents)[0]
    pytest.fail("no step was reused")


def test_a_deep_copy_of_an_attached_transformer_is_a_plain_one():
    pipe, other = ToyPipeline(curved), ToyPipeline(curved)
    calibration, latents = plain_reuse(pipe, [0]), torch.ones(1, 3, 4, 4)
    with ertacache.apply(pipe, calibration):
        expected = run(pipe)
        duplicate = copy.deepcopy(pipe.transformer)
        duplicate.compile(backend="eager")
        assert duplicate._compiled_call_impl is not None and pipe.transformer._compiled_call_impl.compiled is None
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            assert duplicate(latents, t.expand(1))[0].abs().max() > 0  # within the other one's run
            latents = pipe.scheduler.step(pipe.transformer(latents, t.expand(1))[0], t, latents)[0]
        other.transformer = copy.deepcopy(pipe.transformer)
        with ertacache.apply(other, calibration):
            assert torch.equal(run(other), expected)
        assert torch.equal(run(pipe), expected)


# -- what goes wrong -------------------------------------------------------------------------------------


class FailureError(Exception):
    pass


class FailingScheduler(FlowMatchEulerDiscreteScheduler):
    """Raises in the method that `fails` names."""

    fails: str | None = None

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        if self.fails == "set_timesteps":
            raise FailureError

    def step(self, model_output, timestep, sample, return_dict=True):
        if self.fails == "step" and self.step_index == 3:
            raise FailureError
        return super().step(model_output, timestep, sample, return_dict=return_dict)


def in_the_model(pipe):
    pipe.transformer.fails_at = pipe.transformer.calls + 2
    with pytest.raises(FailureError):
        run(pipe)


def in_the_step(pipe):
    pipe.scheduler.fails = "step"
    with pytest.raises(FailureError):
        run(pipe)


def in_the_grid(pipe):
    pipe.scheduler.fails = "set_timesteps"
    with pytest.raises(FailureError):
        run(pipe)


def in_the_loop(pipe):
    pipe.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(pipe)


def in_another_thread(pipe):
    thread = threading.Thread(target=in_the_loop, args=(own_copy(pipe),))
    thread.start()
    thread.join()


def on_another_grid(pipe):
    with pytest.raises(MismatchError):
        run(pipe, num_inference_steps=10)


def at_the_first_latents(pipe):
    pipe.side = 6
    with warnings.catch_warnings(), pytest.raises(MismatchWarning):
        warnings.simplefilter("error")
        run(pipe)


def at_the_beginning(pipe):
    pipe.guidance_scale = 2.0
    with warnings.catch_warnings(), pytest.raises(MismatchWarning):
        warnings.simplefilter("error")
        run(pipe)


def at_the_end(pipe):
    pipe.transformer.spoils = True
    with pytest.raises(NumericsError, match="step 0"):
        run(pipe)


FAILURES = [in_the_model, in_the_step, in_the_grid, in_the_loop, in_another_thread, on_another_grid]
FAILURES += [at_the_first_latents, at_the_beginning, at_the_end]


class ObjectTransformer(ToyTransformer):
    """Returns an object around its output, as diffusers' do."""

    def forward(self, *args, **kwargs):
        return Transformer2DModelOutput(*super().forward(*args, **kwargs))


class AskingTransformer(CachedTransformer, ToyTransformer):
    """Asks whether its step is reused, as the folders' classes do."""

    asked = 0

    def forward(self, *args, **kwargs):
        self.asked += 1
        reused = self.reused_output()
        return super().forward(*args, **kwargs) if reused is None else reused


@pytest.mark.parametrize("kind", [ObjectTransformer, AskingTransformer])
def test_transformers_of_other_kinds_give_the_same(kind):
    plain, pipe = ToyPipeline(curved), ToyPipeline(curved)
    pipe.transformer = kind(curved)
    calibration = fitted(plain)
    with ertacache.apply(plain, calibration):
        expected = run(plain)
    if kind is ObjectTransformer:
        calibration.model["class"] = kind.__name__  # a subclass that asks goes by the name of the one it asks for
    uncached = run(pipe)
    pipe.transformer.calls = pipe.transformer.asked = 0
    seen = []
    with ertacache.apply(pipe, calibration):
        for _ in range(2):
            assert torch.equal(run(pipe), expected)
        pipe.transformer.register_forward_hook(lambda *given: seen.append(type(given[2])))
        run(pipe)
    assert pipe.transformer.calls == 3 * len(calibration.computed_steps)
    assert pipe.transformer.asked == (3 * STEPS if kind is AskingTransformer else 0)
    assert set(seen) == {Transformer2DModelOutput if kind is ObjectTransformer else tuple}
    assert torch.equal(run(pipe), uncached)


def test_the_placeholder_looks_like_the_output():
    for kind, wanted in ((ToyTransformer, tuple), (ObjectTransformer, Transformer2DModelOutput)):
        pipe, latents = ToyPipeline(curved), torch.ones(1, 3, 4, 4)
        pipe.transformer = kind(curved)
        with ertacache.apply(pipe, plain_reuse(pipe, [0])):
            pipe.scheduler.set_timesteps(STEPS)
            t = pipe.scheduler.timesteps
            output = pipe.transformer(latents, t[:1])
            pipe.scheduler.step(output[0], t[0], latents)
            placeholder = pipe.transformer(latents, t[1:2])
        assert type(placeholder) is type(output) is wanted
        assert placeholder[0].shape == output[0].shape and placeholder[0].dtype == output[0].dtype
        assert placeholder[0].untyped_storage().nbytes() == 4 and not placeholder[0].any()


class FailingTransformer(ToyTransformer):
    fails_at = spoils = None

    def forward(self, *args, **kwargs):
        if self.calls == self.fails_at:
            raise FailureError
        (output,) = super().forward(*args, **kwargs)
        return (output / 0 if self.spoils else output,)


def caches_of(attachment) -> list:
    """The caches of the runs that begin from now on."""
    caches, begin = [], attachment.begin
    attachment.begin = lambda scheduler: caches.append(begin(scheduler)) or caches[-1]
    return caches


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: f.__name__)
def test_after_a_failure_nothing_is_left_and_the_next_run_is_right(fail):
    pipe = ToyPipeline(curved, FailingScheduler(shift=1.0))
    pipe.transformer = FailingTransformer(curved)
    plain = run(pipe)
    with ertacache.apply(pipe, fitted(pipe)) as applied:
        caches = caches_of(applied._attachment)
        expected = run(pipe)
        fail(pipe)
        assert applied._attachment.runs == {} and not any(cache.history for cache in caches)
        pipe.scheduler.fails = pipe.transformer.fails_at = pipe.transformer.spoils = pipe.interrupt_at = None
        pipe.side, pipe.guidance_scale = 4, 1.0
        assert torch.equal(run(pipe), expected) and not torch.equal(expected, plain)
    assert torch.equal(run(pipe), plain)
    assert type(pipe) is ToyPipeline and "_ertacache" not in vars(pipe)


@pytest.mark.parametrize(("check", "calls"), [("step", 1), ("end", 4), (None, 4)])
def test_outputs_are_looked_through_at_once_or_at_the_end_or_never(check, calls):
    pipe, made = ToyPipeline(curved), fitted(ToyPipeline(curved))
    pipe.transformer = FailingTransformer(curved)
    pipe.transformer.spoils = True
    with attached(pipe, cache_of(made).begin, check=check) as attachment:
        if check is None:
            assert not run(pipe).isfinite().any()
        else:
            with pytest.raises(NumericsError, match=r"step 0 \(computed\)"):
                run(pipe)
    assert pipe.transformer.calls == calls and attachment.runs == {}


def test_a_loop_of_ones_own_that_broke_off_does_not_reach_the_next_run():
    """Nothing tells that it did, but the next set_timesteps."""
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, fitted(pipe)) as applied:
        expected = run(pipe)
        latents = torch.ones(1, 3, 4, 4)
        for stop in range(1, STEPS):
            pipe.scheduler.set_timesteps(STEPS)
            for t in pipe.scheduler.timesteps[:stop]:
                latents = pipe.scheduler.step(pipe.transformer(latents, t.expand(1))[0], t, latents)[0]
            assert torch.equal(run(pipe), expected) and applied._attachment.runs == {}


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
        caches, held = caches_of(applied._attachment), []
        pipe.transformer.register_forward_pre_hook(lambda *_: held.append(len(caches[-1].history)))
        run(pipe)
        assert held == [0, 1]  # while it runs there is something to drop
        assert len(caches) == 1 and not caches[0].history and applied._attachment.runs == {}


def test_other_step_count_is_refused_and_named():
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, plain_reuse(pipe, [0, 4])), pytest.raises(MismatchError, match=r"10 steps.*for 8"):
        run(pipe, num_inference_steps=10)


def test_other_grid_is_refused():
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 4])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    if not hasattr(pipe.scheduler, "set_shift"):
        pytest.skip("this diffusers has no set_shift")
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
    pipe = ToyPipeline(curved, guidance_scale=3.0)
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


def test_a_step_that_names_no_arguments_is_refused_and_nothing_is_attached():
    pipe = ToyPipeline(curved)
    plain, calibration, original = run(pipe), plain_reuse(pipe, [0, 4]), pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: original(*args, **kwargs)
    before = set(vars(pipe)), set(vars(pipe.transformer)), set(vars(pipe.scheduler))
    with pytest.raises(StateError, match=r"functools\.wraps"):
        ertacache.apply(pipe, calibration)
    assert (set(vars(pipe)), set(vars(pipe.transformer)), set(vars(pipe.scheduler))) == before
    assert torch.equal(run(pipe), plain)


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


def loop(pipe, told, latents=None):
    """A loop of one's own, which tells the scheduler whatever `told` makes of a timestep."""
    latents = torch.ones(1, 3, 4, 4) if latents is None else latents
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        output = pipe.transformer(latents, t.expand(1))[0]
        latents = pipe.scheduler.step(output, told(t), latents)[0]
    return latents


TOLD = {"a view": lambda t: t, "a copy": lambda t: t.clone(), "nearly": lambda t: t + 0.9, "below": lambda t: t - 0.9}


@pytest.mark.parametrize("how", TOLD)
def test_a_timestep_is_known_by_its_place_or_its_value(how):
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, fitted(pipe)):
        expected = loop(pipe, lambda t: t)
        pipe.scheduler.index_for_timestep = lambda *_: 0  # the scheduler's own look-up wants it exact
        assert torch.equal(loop(pipe, TOLD[how]), expected)


@pytest.mark.parametrize("wrong", [lambda t: t + 1.1, lambda t: t - 1.1])
def test_a_timestep_of_another_value_is_refused(wrong):
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, fitted(pipe)), pytest.raises(StateError, match="every step of the grid"):
        loop(pipe, wrong)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_that_comes_without_a_call_of_the_transformer_is_refused(step):
    pipe, latents = ToyPipeline(curved), torch.ones(1, 3, 4, 4)
    with ertacache.apply(pipe, fitted(pipe)):
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps[:step]:
            latents = pipe.scheduler.step(pipe.transformer(latents, t.expand(1))[0], t, latents)[0]
        with pytest.raises(StateError, match=f"step {step} came without a call"):
            pipe.scheduler.step(latents, pipe.scheduler.timesteps[step], latents)


def test_a_scheduler_has_one_attachment_and_a_transformer_too():
    one, shares_scheduler, shares_transformer = (ToyPipeline(curved) for _ in range(3))
    shares_scheduler.scheduler, shares_transformer.transformer = one.scheduler, one.transformer
    calibration = fitted(ToyPipeline(curved))
    with ertacache.apply(one, calibration):
        expected = run(one)
        for other in (shares_scheduler, shares_transformer):
            with pytest.raises(StateError, match="attached already"):
                ertacache.apply(other, calibration)
        assert torch.equal(run(one), expected)
    with ertacache.apply(shares_scheduler, calibration), ertacache.apply(shares_transformer, calibration):
        assert torch.equal(run(shares_scheduler), expected) and torch.equal(run(shares_transformer), expected)


def test_a_scheduler_of_another_attached_pipeline_is_seen_to_be_replaced():
    one, other = ToyPipeline(curved), ToyPipeline(curved)
    calibration = fitted(one)
    with ertacache.apply(one, calibration), ertacache.apply(other, calibration):
        own, one.scheduler = one.scheduler, other.scheduler
        with pytest.raises(StateError, match="replaced"):
            run(one)
        one.scheduler = own


def test_a_replaced_transformer_is_refused():
    pipe, calibration = ToyPipeline(curved), fitted(ToyPipeline(curved))
    plain = run(pipe)
    with ertacache.apply(pipe, calibration):
        own, pipe.transformer = pipe.transformer, ToyTransformer(curved)
        with pytest.raises(StateError, match="transformer was replaced"):
            run(pipe)
        pipe.transformer, pipe.transformer_2 = own, ToyTransformer(curved)
        with pytest.raises(StateError, match="transformer_2 was replaced"):
            run(pipe)
        del pipe.transformer_2
        assert not torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), plain)


def test_a_grid_that_is_begun_in_the_middle_is_refused():
    pipe, latents = ToyPipeline(curved), torch.ones(1, 3, 4, 4)
    with ertacache.apply(pipe, fitted(pipe)):
        for begin in (0, 2):
            pipe.scheduler.set_timesteps(STEPS)
            pipe.scheduler.set_begin_index(begin)
            output, first = pipe.transformer(latents, torch.ones(1))[0], pipe.scheduler.timesteps[begin]
            if begin:
                with pytest.raises(StateError, match="starts at step 2"):
                    pipe.scheduler.step(output, first, latents)
            else:
                pipe.scheduler.step(output, first, latents)


def test_removal_ends_every_run():
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, fitted(pipe)) as applied:
        caches, latents = caches_of(applied._attachment), torch.ones(1, 3, 4, 4)
        pipe.scheduler.set_timesteps(STEPS)
        pipe.scheduler.step(pipe.transformer(latents, torch.ones(1))[0], pipe.scheduler.timesteps[0], latents)
        assert caches[0].history
    assert not caches[0].history and applied._attachment.runs == {}


def test_the_place_of_a_timestep_is_read_from_its_memory():
    grid = torch.arange(8.0)
    assert [place_in_grid(t, grid) for t in grid] == list(range(8))
    assert [place_in_grid(t, grid[2:]) for t in grid[2:]] == list(range(6))
    assert [place_in_grid(t, grid[::2]) for t in grid[::2]] == list(range(4))
    for timestep, of in ((grid[1].clone(), grid), (1.0, grid), (grid[1], [0.0, 1.0]), (grid[0], grid[:1].expand(8))):
        assert place_in_grid(timestep, of) is None
    on_meta = torch.arange(8.0, device="meta")
    assert place_in_grid(on_meta[3], on_meta) is None


def test_pipeline_without_a_transformer_is_refused():
    pipe = ToyPipeline(curved)
    calibration = plain_reuse(pipe, [0, 4])
    del pipe.transformer
    with pytest.raises(MismatchError, match="no transformer"):
        ertacache.apply(pipe, calibration)
