"""Every rival really caches, leaves nothing behind, and is tuned to the cost that it is asked for."""

import ast
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler, MagCacheConfig
from tiny_flux import NUM_BLOCKS, NUM_STEPS, SIDE, call, flux_pipeline, modulated_input
from torch import Tensor

from compare.flops import TransformerCost
from compare.rivals import (
    CacheDit,
    EasyCache,
    FasterCache,
    FewerSteps,
    MagCache,
    Multistep,
    NotApplicable,
    PyramidAttentionBroadcast,
    Rival,
    TeaCache,
    Tuner,
    all_rivals,
)
from compare.rivals.diffusers_caches import enabled, visual_latents
from compare.rivals.fitted import FittedRival
from compare.rivals.multistep import SOLVERS, make_solver, put_on_grid
from compare.rivals.teacache import _Gate, relative_distance

# those that are fitted are in test_fitted_rivals.py
RIVALS = {rival.name: rival for rival in all_rivals(modulated_input) if not isinstance(rival, FittedRival)}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux_pipeline()


@pytest.fixture(scope="module")
def reference(pipe) -> Tensor:
    return call(pipe)


@pytest.fixture(params=RIVALS)
def rival(request, pipe, reference) -> Rival:
    made = RIVALS[request.param]
    if isinstance(made, CacheDit):
        pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    if getattr(made, "coefficients", 0) is None or getattr(made, "mag_ratios", 0) is None:
        made.prepare(pipe, [lambda **o: call(pipe, seed=7, **o), lambda **o: call(pipe, seed=8, **o)], NUM_STEPS)
    return made


class Interrupted(Exception):
    pass


def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
    if step == NUM_STEPS // 2:
        raise Interrupted
    return tensors


def test_a_rival_skips_work_and_leaves_nothing_behind(rival, pipe, reference):
    cheap = rival.settings(NUM_STEPS)[len(rival.settings(NUM_STEPS)) // 4]
    names = [name for name, _ in pipe.transformer.named_modules()]
    with TransformerCost(pipe.transformer) as uncached:
        call(pipe)
    with rival.attach(pipe, cheap) as overrides, TransformerCost(pipe.transformer) as cost:
        call(pipe, **overrides)
    assert cost.flops < 0.95 * uncached.flops
    assert min(cost.block_calls, cost.attention_calls) < uncached.attention_calls == NUM_BLOCKS * NUM_STEPS
    assert torch.equal(call(pipe), reference)
    assert [name for name, _ in pipe.transformer.named_modules()] == names  # the order, too: caches go by it


def test_a_run_knows_nothing_of_the_one_before_it(rival, pipe, reference):
    cheap = rival.settings(NUM_STEPS)[0]
    with rival.attach(pipe, cheap) as overrides:
        first = call(pipe, **overrides)
        call(pipe, seed=5, **overrides)
        assert torch.equal(call(pipe, **overrides), first)


def test_an_exception_leaves_nothing_behind(rival, pipe, reference):
    cheap = rival.settings(NUM_STEPS)[0]
    with rival.attach(pipe, cheap) as overrides:
        first = call(pipe, **overrides)
        with pytest.raises(Interrupted):
            call(pipe, callback_on_step_end=interrupt, num_inference_steps=NUM_STEPS)
        assert torch.equal(call(pipe, **overrides), first)
    with pytest.raises(Interrupted), rival.attach(pipe, cheap):
        call(pipe, callback_on_step_end=interrupt, num_inference_steps=NUM_STEPS)
    assert torch.equal(call(pipe), reference)


def test_settings_go_from_cheap_to_expensive(rival, pipe):
    tuner = Tuner(pipe, [lambda **o: call(pipe, **o)], NUM_STEPS)
    for sweep in rival.sweeps(NUM_STEPS):
        cheapest, dearest = tuner.measure(rival, sweep[0]), tuner.measure(rival, sweep[-1])
        assert cheapest.fraction < dearest.fraction <= 1.05


def test_a_multistep_solver_of_first_order_is_the_pipelines_euler(pipe):
    """Dynamic shift and all, so grid and conventions agree."""
    with Multistep(order=1).attach(pipe, {"num_steps": 5, "solver": "dpmsolver++"}) as overrides:
        ours = call(pipe, **overrides)
    torch.testing.assert_close(ours, call(pipe, num_inference_steps=5), rtol=1e-4, atol=1e-4)


def test_unipc_of_first_order_without_its_corrector_is_euler():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(5)
    unipc = make_solver(euler, "unipc", order=1)
    put_on_grid(unipc, euler)
    unipc.disable_corrector = list(range(5))
    ours = theirs = torch.tensor([[1.0, -0.5, 2.0]])
    for i, timestep in enumerate(euler.timesteps):
        velocity = torch.tensor([[0.3, 1.0, -2.0]]) * (i + 1)
        ours = unipc.step(velocity, timestep, ours).prev_sample
        theirs = euler.step(velocity, timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_multistep_solver_is_on_the_grid_of_the_pipelines_scheduler(solver):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9)
    multistep = make_solver(scheduler, solver, order=2)
    put_on_grid(multistep, scheduler)
    torch.testing.assert_close(multistep.sigmas, scheduler.sigmas, rtol=0, atol=2e-6)
    assert torch.equal(multistep.timesteps, scheduler.timesteps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_multistep_solver_is_exact_for_a_constant_prediction_of_the_data(solver):
    """With x0 known, v = (x - x0) / sigma, any consistent solver ends at x0 exactly."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    multistep = make_solver(scheduler, solver, order=2)
    put_on_grid(multistep, scheduler)
    data = torch.tensor([[0.3, -2.0, 5.0]])
    sample = torch.tensor([[1.0, 0.5, -1.0]])
    for timestep, sigma in zip(multistep.timesteps, multistep.sigmas, strict=False):
        sample = multistep.step((sample - data) / sigma, timestep, sample).prev_sample
    torch.testing.assert_close(sample, data, rtol=0, atol=1e-5)


def test_a_first_order_solver_is_cogvideox_ddim():
    """On a grid whose spacing divides 1000, where the stock scheduler's own previous timestep is right."""
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
    )
    scheduler.set_timesteps(10)
    first_order = make_solver(scheduler, "dpmsolver++", order=1)
    put_on_grid(first_order, scheduler)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, generator=generator)
    for timestep in scheduler.timesteps:
        prediction = torch.randn(2, 4, generator=generator)
        ours = first_order.step(prediction, timestep, ours).prev_sample
        theirs = scheduler.step(prediction, timestep, theirs, eta=0.0).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_teacache_accumulates_the_rescaled_distance_by_hand():
    """Signals 1, 2, 3, 6: distances 1, 0.5, 1, rescaled by 0.1 d; the sum reaches 0.2 at the third."""
    gate = _Gate(None, lambda _, arguments: arguments["signal"], [0.1, 0.0], threshold=0.2)
    gate.clock.num_steps = 10
    computed = []
    for gate.clock.step, signal in enumerate([1.0, 2.0, 3.0, 6.0]):
        hidden = torch.full((1,), float(gate.clock.step))
        gate.clock.arguments = {"signal": torch.tensor([signal])}
        result = gate.enter({"hidden_states": hidden})
        computed.append(result is None)
        if result is None:
            gate.leave(hidden, hidden + 5)
        else:
            assert torch.equal(result, hidden + 5)
    assert computed == [True, False, False, True]
    assert relative_distance(torch.tensor([3.0]), torch.tensor([2.0])) == 0.5


@pytest.mark.parametrize("name", ["teacache", "easycache"])
@pytest.mark.parametrize("rival", ["teacache"], indirect=True)
def test_a_threshold_of_zero_reuses_nothing(name, rival, pipe, reference):
    with RIVALS[name].attach(pipe, {"threshold": 0.0}), TransformerCost(pipe.transformer) as cost:
        assert torch.equal(call(pipe), reference)
    assert cost.transformer_calls == NUM_STEPS


@pytest.mark.parametrize("rival", ["teacache"], indirect=True)
@pytest.mark.parametrize(("name", "steps"), [("teacache", 2), ("easycache", round(0.2 * NUM_STEPS) + 1)])
def test_an_endless_threshold_computes_only_what_it_must(name, steps, rival, pipe):
    """The warm-up, and the last step."""
    with RIVALS[name].attach(pipe, {"threshold": 1e9}), TransformerCost(pipe.transformer) as cost:
        call(pipe)
    assert cost.block_calls == steps * NUM_BLOCKS


def test_guidance_branches_have_states_of_their_own():
    """Branches that are the same give the same outputs, so guidance between them changes nothing."""
    pipe = flux_pipeline()
    tea_cache = TeaCache(modulated_input)
    tea_cache.prepare(pipe, [lambda **o: call(pipe, true_cfg=True, **o)], NUM_STEPS)
    same = {"prompt_embeds": torch.ones(1, 5, 12), "pooled_prompt_embeds": torch.ones(1, 8)}
    same |= {"negative_" + name: value for name, value in same.items()}
    for rival in (tea_cache, EasyCache()):
        with rival.attach(pipe, {"threshold": 1e9}), TransformerCost(pipe.transformer) as cost:
            guided = call(pipe, true_cfg=True, **same)
            calls = cost.block_calls
            plain = call(pipe, true_cfg=True, **same, true_cfg_scale=1.0)
        assert calls == 2 * (cost.block_calls - calls) < 2 * NUM_STEPS * NUM_BLOCKS
        torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", [PyramidAttentionBroadcast(), FasterCache(), CacheDit()], ids=lambda made: made.name)
def test_a_rival_that_would_mix_up_branches_is_not_applicable(made):
    pipe = flux_pipeline(guidance_embeds=False)
    before = call(pipe, true_cfg=True)
    with pytest.raises(NotApplicable), made.attach(pipe, made.settings(NUM_STEPS)[0]):
        call(pipe, true_cfg=True)
    assert torch.equal(call(pipe, true_cfg=True), before)


def test_magcache_is_calibrated_as_diffusers_prints_it(pipe, capsys):
    ours = MagCache()
    ours.prepare(pipe, [lambda **o: call(pipe, **o)], NUM_STEPS)
    with enabled(pipe, MagCacheConfig(calibrate=True, num_inference_steps=NUM_STEPS)):
        call(pipe)
    printed = ast.literal_eval(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")))
    assert ours.mag_ratios == pytest.approx(printed, rel=1e-5)


def test_magcache_refuses_a_run_of_another_length(pipe):
    made = MagCache(mag_ratios=[1.0] * (NUM_STEPS - 1))
    with pytest.raises(NotApplicable, match="calibrated for"), made.attach(pipe, made.settings(NUM_STEPS)[0]):
        call(pipe)


def test_rivals_that_need_a_calibration_say_so(pipe):
    for made, setting in ((MagCache(), {"threshold": 0.1}), (TeaCache(), {"threshold": 0.1})):
        with pytest.raises(NotApplicable, match="call prepare"), made.attach(pipe, setting):
            pass


def test_seacache_sees_the_latents_that_the_pipeline_packed(pipe):
    side = SIDE // pipe.vae_scale_factor
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(latents, 1, 4, side, side)
    ids = pipe._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32)
    (seen,) = visual_latents(pipe.transformer, (), {"hidden_states": packed, "img_ids": ids})
    assert torch.equal(seen.squeeze(1), latents[0])


def test_tuning_finds_the_asked_cost(pipe):
    tuned = Tuner(pipe, [lambda **o: call(pipe, **o)], NUM_STEPS).tune(FewerSteps(), 0.5)
    assert (tuned.setting, tuned.fraction, tuned.comparable) == ({"num_steps": NUM_STEPS // 2}, 0.5, True)


def test_tuning_marks_what_cannot_get_there(pipe):
    tuner = Tuner(pipe, [lambda **o: call(pipe, **o)], NUM_STEPS)
    too_dear = tuner.tune(PyramidAttentionBroadcast(), 0.3)  # it skips attention only
    assert too_dear.fraction > 0.5
    assert not too_dear.comparable
    between = tuner.tune(FewerSteps(), 0.51)  # the next step is 1/12 away
    assert (between.setting["num_steps"], between.comparable) == (NUM_STEPS // 2 + 1, False)


def test_tuning_takes_the_best_variant(pipe):
    """Both solvers cost the same; the one nearer to the uncached result is chosen."""
    tuner = Tuner(pipe, [lambda **o: call(pipe, **o)], NUM_STEPS)
    made = Multistep()
    tuned = tuner.tune(made, 0.5)
    errors = [tuner.measure(made, {"num_steps": NUM_STEPS // 2, "solver": solver}).error for solver in SOLVERS]
    assert tuned.error == min(errors) < max(errors)
