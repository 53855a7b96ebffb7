"""The rivals on Open-Sora's pipeline: those that fit really skip work, the others say why they do not."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from opensora_folder import NUM_STEPS, call, folder_modules, pipeline

from compare.flops import TransformerCost
from compare.rivals import EasyCache, Multistep, NotApplicable, all_rivals
from compare.rivals.fitted import FittedRival
from compare.rivals.multistep import ADAMS_BASHFORTH, SOLVERS, AdamsBashforth, make_solver, velocity_sign

# isort: split
from opensora12 import RFlowScheduler

with folder_modules() as modules:
    every = all_rivals(modules["transformer"].modulated_input)
    RIVALS = {rival.name: rival for rival in every if not isinstance(rival, FittedRival)}
UNFIT = {
    "pyramid-attention-broadcast": "attention classes",
    "fastercache": "attention classes",
    "cache-dit": "does not know OpenSoraPipeline|not installed",
}


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def reference(pipe):
    return call(pipe)


@pytest.mark.parametrize("name", sorted(set(RIVALS) - set(UNFIT)))
def test_a_rival_skips_work_and_leaves_nothing_behind(name, pipe, reference):
    rival = RIVALS[name]
    rival.prepare(pipe, [lambda **o: call(pipe, seed=7, **o), lambda **o: call(pipe, seed=8, **o)], NUM_STEPS)
    with TransformerCost(pipe.transformer) as uncached:
        call(pipe)
    for sweep in rival.sweeps(NUM_STEPS):
        with rival.attach(pipe, sweep[len(sweep) // 4]) as overrides, TransformerCost(pipe.transformer) as cost:
            first = call(pipe, **overrides)
            calls, work = cost.attention_calls, min(cost.block_calls, cost.attention_calls)
            assert torch.equal(call(pipe, **overrides), first)
        assert work < uncached.attention_calls and cost.attention_calls == 2 * calls
        assert torch.isfinite(first).all() and not torch.equal(first, reference)
        assert torch.equal(call(pipe), reference)


@pytest.mark.parametrize("name", sorted(UNFIT))
def test_a_rival_that_does_not_fit_says_so(name, pipe, reference):
    rival = RIVALS[name]
    with pytest.raises(NotApplicable, match=UNFIT[name]), rival.attach(pipe, rival.settings(NUM_STEPS)[0]):
        call(pipe)
    assert torch.equal(call(pipe), reference)


def test_easycache_reuses_the_velocity_and_keeps_the_variances(pipe, reference):
    with EasyCache().attach(pipe, {"threshold": 0.0}):
        assert torch.equal(call(pipe), reference)
    outputs, inputs = [], []
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        pipe.transformer.register_forward_hook(lambda _, __, output: outputs.append(output[0])),
    ]
    with EasyCache().attach(pipe, {"threshold": 1e9}):
        call(pipe)
    for hook in hooks:
        hook.remove()
    last_computed = max(1, round(0.2 * NUM_STEPS))  # with one more for the rate
    residual = outputs[last_computed][:, :4] - inputs[last_computed]
    for i in range(last_computed + 1, NUM_STEPS - 1):
        torch.testing.assert_close(outputs[i][:, :4], inputs[i] + residual)
        assert torch.equal(outputs[i][:, 4:], outputs[last_computed][:, 4:])


# -- multistep solvers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpmsolver++", ADAMS_BASHFORTH])
def test_a_solver_of_first_order_is_the_pipelines_own(pipe, solver):
    with Multistep(order=1).attach(pipe, {"num_steps": 5, "solver": solver}) as overrides:
        made = call(pipe, **overrides)
    torch.testing.assert_close(made, call(pipe, num_inference_steps=5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [*SOLVERS, ADAMS_BASHFORTH])
def test_a_solver_of_second_order_comes_nearer_on_a_curved_path(solver):
    """v = 3 (1 - x) towards data at 1, from noise -1: exact solution by many steps."""

    def final(num_steps: int, multistep: Multistep | None) -> float:
        scheduler = RFlowScheduler()
        holder = type("Pipeline", (), {"scheduler": scheduler})()
        x = torch.full((1, 1, 1, 1), -1.0)

        def run() -> float:
            nonlocal x
            scheduler.set_timesteps(num_steps, height=512, width=512, num_frames=17)
            scheduler.set_begin_index(0)
            for t in scheduler.timesteps:
                x = scheduler.step(3 * (1 - x), t, x, return_dict=False)[0]
            return float(x)

        if multistep is None:
            return run()
        with multistep.attach(holder, {"num_steps": num_steps, "solver": solver}):
            return run()

    exact, euler = final(4000, None), final(12, None)
    assert abs(final(12, Multistep()) - exact) < 0.5 * abs(euler - exact)


def test_adams_bashforth_is_exact_for_a_velocity_that_is_linear_in_time():
    """v = 2 sigma: x = sigma^2 + constant; the first step alone is Euler's."""
    solver = AdamsBashforth()
    solver.sigmas = torch.tensor([1.0, 0.7, 0.6, 0.1, 0.0])
    x = torch.ones(1)
    for i, sigma in enumerate(solver.sigmas[:-1]):
        x = solver.step(2 * sigma.view(1), None, x)[0]
        if i == 0:
            x = solver.sigmas[1].square().view(1)
        torch.testing.assert_close(x, solver.sigmas[i + 1].square().view(1), atol=1e-6, rtol=0)


def test_the_sign_of_a_velocity_shows_in_the_schedulers_step():
    euler, rflow = FlowMatchEulerDiscreteScheduler(shift=3.0), RFlowScheduler()
    euler.set_timesteps(6)
    rflow.set_timesteps(6, height=64, width=64, num_frames=17)
    assert velocity_sign(euler) == 1 and velocity_sign(rflow) == -1
    with pytest.raises(NotApplicable, match="no multistep counterpart"):
        make_solver(FlowMatchHeunDiscreteScheduler(), "unipc", 2)
