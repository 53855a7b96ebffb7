"""Rivals that are fitted: what they fit comes nearer, costs what they say, and leaves nothing behind."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_flux import NUM_BLOCKS, call, flux_pipeline
from torch import Tensor
from toys import ToyPipeline, curved, flow_solver

from compare.flops import TransformerCost
from compare.rivals import (
    BudCache,
    LearnedSolver,
    MeanCache,
    NotApplicable,
    OptimisedSteps,
    PromptRun,
    budcache,
    learned,
)
from compare.rivals.linear import LinearSolver, linear_form, on_grid, trajectory, warped
from compare.rivals.meancache import average_velocity, edge_errors, shortest_path
from compare.rivals.multistep import ADAMS_BASHFORTH

STEPS, COUNT = 8, 4
SHORT = {"num_inference_steps": STEPS}


class Reversed(FlowMatchEulerDiscreteScheduler):
    """Takes data - noise, as Open-Sora's does."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **rest: Any) -> Any:
        return super().step(-model_output, timestep, sample, **rest)


def reversed_curved(latents: Tensor, sigma: Tensor) -> Tensor:
    return -curved(latents, sigma)


def toy(scheduler: Any = None, velocity: Any = curved) -> tuple[ToyPipeline, list[PromptRun]]:
    pipe = ToyPipeline(velocity, scheduler)
    return pipe, [PromptRun(pipe, "x", seed, SHORT) for seed in range(4)]


def error_of(rival: Any, pipe: Any, runs: list[PromptRun]) -> float:
    reference = PromptRun.batch(runs, {})
    with rival.attach(pipe, {"num_steps": COUNT}) as overrides, torch.no_grad():
        return float((PromptRun.batch(runs, overrides) - reference).square().mean())


@pytest.fixture
def few(monkeypatch):
    """Fits of seconds."""
    for module, name, value in (
        (learned, "CHECK_EVERY", 2),
        (learned, "PATIENCE", 1),
        (learned, "FALLS", 0),
        (budcache, "ANNEALING", 3),
        (budcache, "CLIMBS", 1),
        (budcache, "LEFT_OUT", 1),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        Reversed(shift=3.0),
        flow_solver(UniPCMultistepScheduler, flow_shift=3.0),
        CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_linear_form_of_a_pipelines_own_solver_makes_its_steps(scheduler):
    pipe, runs = toy(scheduler)
    form = linear_form(on_grid(pipe, runs[0], 5))
    wanted = runs[0](num_inference_steps=5)
    with LinearSolver.from_dict(json.loads(json.dumps(form.to_dict()))).played(pipe) as overrides:
        torch.testing.assert_close(runs[0](**overrides), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(runs[0](num_inference_steps=5), wanted, rtol=0, atol=0)


def test_places_between_the_steps_of_a_grid_are_interpolated():
    """The weights of a step's outputs add up to the way from the first noise level."""
    pipe, runs = toy()
    scheduler = on_grid(pipe, runs[0], STEPS)
    form = linear_form(scheduler, ADAMS_BASHFORTH, [0, 2.5, 6])
    levels = torch.stack([scheduler.sigmas[2:4].mean(), scheduler.sigmas[6], scheduler.sigmas[8]])
    torch.testing.assert_close(form.outputs.sum(1), levels - scheduler.sigmas[0], rtol=0, atol=1e-6)
    assert warped(STEPS, COUNT, 1.0) == [0, 2, 4, 6] and warped(STEPS, COUNT, 2.0) == [0, 0.5, 2, 4.5]


@pytest.mark.parametrize(("scheduler", "velocity"), [(None, curved), (Reversed(), reversed_curved)])
def test_a_learned_solver_comes_nearer_within_its_budget(scheduler, velocity):
    pipe, runs = toy(scheduler, velocity)
    scheduler = on_grid(pipe, runs[0], STEPS)
    names = [ADAMS_BASHFORTH, "dpmsolver++", "unipc"]
    forms = [linear_form(scheduler, name, warped(STEPS, COUNT, power)) for name in names for power in learned.POWERS]
    rival = LearnedSolver(budget=100)
    rival.prepare(pipe, runs, STEPS)
    reached = error_of(rival, pipe, runs)
    for form in forms:
        rival.fits[COUNT], kept = {"solver": form.to_dict()}, rival.fits[COUNT]
        assert reached < 0.3 * error_of(rival, pipe, runs)
        rival.fits[COUNT] = kept
    # a batch of the toy is one call: the references, the tries, the steps, which count three times
    assert 95 < rival.spent({"num_steps": COUNT}) <= 100


def test_the_better_learning_rate_is_kept_and_a_finished_one_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(learned, "RATES", (1.0, 2e-3))
    pipe, runs = toy()
    begun, for_steps = [], learned.Training.for_steps

    def noted(training, count, rate):
        begun.append(rate)
        for_steps(training, count, rate)

    monkeypatch.setattr(learned.Training, "for_steps", noted)

    def fitted() -> dict:
        rival = LearnedSolver(budget=30)
        rival.folder = tmp_path
        rival.prepare(pipe, runs, STEPS)
        return rival.fitted(pipe, COUNT)

    made = fitted()
    assert made["rate"] == 2e-3 and begun == [1.0, 2e-3] and made["runs"] <= 30
    for kept in tmp_path.glob("*"):
        if not kept.name.endswith("-1.json"):
            kept.unlink()
    assert fitted()["solver"] == made["solver"] and begun == [1.0, 2e-3, 2e-3]


def test_a_fit_without_a_budget_goes_on_where_it_was(few, tmp_path, monkeypatch):
    def prepared(folder: Path) -> LearnedSolver:
        pipe, runs = toy()
        rival = LearnedSolver(unlimited=True)
        rival.folder = folder
        rival.prepare(pipe, runs, STEPS)
        return rival

    def fitted(folder: Path) -> dict:
        rival = prepared(folder)
        return rival.fitted(rival.runs[0].pipe, COUNT)

    monkeypatch.setattr(learned, "PATIENCE", 3)
    whole = fitted(tmp_path / "a")
    assert whole["history"][-1] > whole["history"][0] and len(whole["history"]) > 3
    original, checks = learned.Training._left_out, []

    def interrupted(self, first):
        checks.append(1)
        if len(checks) == 3:
            raise KeyboardInterrupt
        return original(self, first)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learned.Training, "_left_out", interrupted)
        fitted(tmp_path / "b")
    again = fitted(tmp_path / "b")
    assert again["history"] == whole["history"] and again["solver"] == whole["solver"]
    monkeypatch.setattr(learned.LearnedSolver, "fit", lambda *_: pytest.fail("fitted once more"))
    assert fitted(tmp_path / "b") == again
    assert prepared(tmp_path / "b").spent({"num_steps": COUNT}) == again["runs"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_optimised_grid_steps_where_the_velocity_changes(sign):
    """A velocity that is constant over three stretches of the grid is followed exactly by three steps."""

    def stepwise(latents: Tensor, sigma: Tensor) -> Tensor:
        return sign * (1.0 + (sigma < 0.8) + 2.0 * (sigma < 0.3)).expand_as(latents)

    pipe, runs = toy(Reversed() if sign < 0 else None, stepwise)
    rival = OptimisedSteps()
    rival.prepare(pipe, runs, STEPS)
    sigmas = on_grid(pipe, runs[0], STEPS).sigmas[:-1]
    changes = [0, int((sigmas >= 0.8).sum()), int((sigmas >= 0.3).sum())]
    assert rival.fitted(pipe, 3)["steps"] == changes
    with rival.attach(pipe, {"num_steps": 3}) as overrides:
        torch.testing.assert_close(runs[0](**overrides), runs[0](), rtol=0, atol=1e-5)


def test_the_average_velocity_of_a_straight_change_is_exact():
    """v = t along z = t^2 / 2: between t and s it is (t + s) / 2 in the mean."""
    sigmas = [1.0, 0.7, 0.3, 0.0]
    states = [torch.tensor(t * t / 2) for t in sigmas]
    velocities = [torch.tensor(t) for t in sigmas]
    assert float(average_velocity((1, 3, 1), velocities[1], states, velocities, sigmas)) == pytest.approx(0.35)
    assert float(average_velocity((1, 3, 0), velocities[1], states, velocities, sigmas)) == pytest.approx(0.7)


def test_the_schedule_of_averages_is_the_best_of_all():
    pipe, runs = toy()
    sigmas = on_grid(pipe, runs[0], STEPS).sigmas.tolist()
    errors = edge_errors(*trajectory(pipe, runs), sigmas)

    def cost(edges) -> float:
        return sum((errors[edge] * (sigmas[edge[0]] - sigmas[edge[1]])) ** 3 for edge in edges)

    best = min(
        sum(
            (min(errors[a, b, s] for s in range(7) if (a, b, s) in errors) * (sigmas[a] - sigmas[b])) ** 3
            for a, b in itertools.pairwise((0, *middle, STEPS))
        )
        for middle in itertools.combinations(range(1, STEPS), COUNT - 1)
    )
    found = shortest_path(errors, sigmas, COUNT, 3, by_length=True)
    assert cost(found) == pytest.approx(best) and len(found) == COUNT


@pytest.mark.parametrize(("scheduler", "velocity"), [(None, curved), (Reversed(), reversed_curved)])
def test_average_velocities_are_nearer_than_fewer_steps(scheduler, velocity):
    pipe, runs = toy(scheduler, velocity)
    rival = MeanCache()
    rival.prepare(pipe, runs, STEPS)
    fewer = PromptRun.batch(runs, {"num_inference_steps": COUNT}) - PromptRun.batch(runs, {})
    assert error_of(rival, pipe, runs) < float(fewer.square().mean())
    with pytest.raises(NotApplicable, match="flow matching"):
        pipe, runs = toy(CogVideoXDDIMScheduler())
        rival.prepare(pipe, runs, STEPS)
        rival.fit(pipe, COUNT)


def test_annealing_and_climbing_find_the_best_schedule():
    target = (0, 1, 5, 9, 14)
    error = lambda schedule: 1e-3 * sum(abs(a - b) for a, b in zip(schedule, target, strict=True))  # noqa: E731
    found, tried = budcache.search(error, 16, len(target))
    assert found == target and tried < 1820  # of all with the first step computed


@pytest.mark.parametrize(
    "rival",
    [MeanCache(), BudCache(), OptimisedSteps(), LearnedSolver(budget=12), LearnedSolver(unlimited=True)],
    ids=lambda rival: rival.name,
)
def test_a_fitted_rival_skips_work_and_leaves_nothing_behind(rival, few):
    pipe = flux_pipeline()
    reference = call(pipe, **SHORT)
    names = [name for name, _ in pipe.transformer.named_modules()]
    with pytest.raises(NotApplicable, match="prepare"), rival.attach(pipe, {"num_steps": COUNT}):
        pass
    rival.prepare(pipe, [lambda seed=seed, **o: call(pipe, seed=seed, **{**SHORT, **o}) for seed in (7, 8)], STEPS)
    with pytest.raises(NotApplicable, match="too many"), rival.attach(pipe, {"num_steps": STEPS + 1}):
        pass
    setting = rival.setting_for(COUNT / STEPS, STEPS)
    rival.fitted(pipe, COUNT)
    copy.deepcopy(pipe.scheduler)
    with rival.attach(pipe, setting) as overrides:
        with TransformerCost(pipe.transformer) as cost:
            first = call(pipe, **{**SHORT, **overrides})
        call(pipe, seed=5, **{**SHORT, **overrides})
        assert torch.equal(call(pipe, **{**SHORT, **overrides}), first)
    assert cost.block_calls == COUNT * NUM_BLOCKS and torch.isfinite(first).all()
    assert rival.spent(setting) > 2
    assert torch.equal(call(pipe, **SHORT), reference) and not torch.equal(first, reference)
    assert [name for name, _ in pipe.transformer.named_modules()] == names
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


def test_learned_noise_levels_come_nearer(few, monkeypatch):
    pipe = flux_pipeline()
    runs = [lambda seed=seed, **o: call(pipe, seed=seed, **{**SHORT, **o}) for seed in range(5)]
    with torch.no_grad():
        wanted = torch.cat([run() for run in runs])
    monkeypatch.setattr(budcache, "BATCH", 1)
    scheduler = on_grid(pipe, runs[0], STEPS)
    sigmas, _ = budcache.learn_sigmas(pipe, (0, 2, 4, 6), scheduler, runs, wanted)
    assert (
        sigmas is not None and sigmas == sorted(sigmas, reverse=True) and sigmas[0] == 1.0 and len(sigmas) == STEPS + 1
    )
