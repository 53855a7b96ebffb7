"""End-to-end rectification, and runs with given outputs, on toy pipelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from test_attach import run
from toys import ToyPipeline, curved

import ertacache
from ertacache import forms, refinement
from ertacache.announcement import Work
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.fit.end_to_end import (
    RIDGES,
    LinearisedRun,
    linearisation_evaluations,
    linearise,
    refine,
    refinement_evaluations,
)
from ertacache.fit.forms import best_form, best_refined_form, form_evaluations
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import recorded_runs
from ertacache.fit.schedule import choose_schedule, error_growth, growth_evaluations, growth_places
from ertacache.fit.step_by_step import REFINED_FORM, Fitter, Form
from ertacache.rectification import LATENTS, Coefficients, combine

PROMPTS = [f"prompt {i}" for i in range(6)]
STEPS = 12
SCHEDULE = [0, 1, 3, 6, 9]


def unipc():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


SCHEDULERS = {"euler": FlowMatchEulerDiscreteScheduler, "unipc": unipc, "ddim": DDIMScheduler}


def recorded(scheduler="euler", **kwargs):
    pipe = ToyPipeline(curved, scheduler=SCHEDULERS[scheduler](), **kwargs)
    return recorded_runs(pipe, PROMPTS, seeds=range(6), num_inference_steps=STEPS)


def fitted(runs, schedule=SCHEDULE) -> Coefficients:
    fitter = Fitter(schedule, runs.recorded.latents, form=REFINED_FORM)
    runs.run(fitter)
    return fitter.fitted()


def calibrate(pipe, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "seeds": range(6), "progress": False, "computed_steps": 5, **kwargs}
    return ertacache.calibrate(pipe, PROMPTS, **kwargs)


# -- combinations ------------------------------------------------------------------------------------------


def test_the_sample_has_a_share():
    newest, older, sample = (torch.randn(2, 3) for _ in range(3))
    made = combine([newest, older], [0.5, 2.0], sample, -0.25)
    torch.testing.assert_close(made, 0.5 * newest + 2 * older - 0.25 * sample)
    assert combine([newest], [1.0], sample, 0.0) is newest
    assert combine([newest.half()], [1.0], sample, 0.5).dtype == torch.float16


def test_changes_land_at_their_places():
    before = Coefficients.of_outputs([[1.0], [1.0, 0.0]])
    after = before.changed([(1, 1), (1, LATENTS), (0, 0)], [0.5, 0.25, -0.125])
    assert (after.outputs, after.latents_coefficients) == ([[0.875], [1.0, 0.5]], [0.0, 0.25])
    assert before == Coefficients.of_outputs([[1.0], [1.0, 0.0]])
    assert before.plain(0) and not after.plain(0) and not after.plain(1)


# -- runs made again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_given_outputs_are_not_computed_and_lead_to_the_same_end(scheduler):
    runs = recorded(scheduler)
    calls = runs.pipe.transformer.calls
    steps = list(range(STEPS))
    plain = Coefficients.of_outputs([[1.0]] * STEPS)
    final = runs.run(Rerun(steps, plain, runs.recorded.outputs[:8]))
    assert runs.pipe.transformer.calls - calls == STEPS - 8
    torch.testing.assert_close(final, runs.recorded.latents[-1])
    assert torch.equal(runs.run(Rerun(steps, plain, runs.recorded.outputs)), runs.recorded.latents[-1])


def test_the_first_prompts_alone_end_where_they_did():
    runs = recorded()
    few = runs.first(2)
    final = few.run(Rerun(list(range(STEPS)), Coefficients.of_outputs([[1.0]] * STEPS)))
    torch.testing.assert_close(final, runs.recorded.latents[-1][:2])
    assert len(runs.first(99)) == len(runs)


# -- the Gauss-Newton step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_the_linearised_run_foretells_small_changes(scheduler):
    runs = recorded(scheduler)
    coefficients = fitted(runs)
    linear = linearise(runs, SCHEDULE, coefficients)
    change = 1e-3 * np.random.default_rng(0).normal(size=len(linear.places))
    final = runs.run(Rerun(SCHEDULE, linear.changed(change)))
    measured = (final - runs.recorded.latents[-1]).square().flatten(1).sum(1).numpy()
    assert linear.errors(change) == pytest.approx(measured, rel=0.1)
    assert linear.errors(0 * change) == pytest.approx(linear.squares)


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_refinement_brings_unseen_prompts_nearer(scheduler):
    pipe = ToyPipeline(curved, scheduler=SCHEDULERS[scheduler]())
    plain, refined = calibrate(pipe), calibrate(pipe, refine=6)
    assert any(refined.sample_coefficients) and refined.channel_coefficients is None
    assert refined.predicted["psnr"] > plain.predicted["psnr"] + 2
    errors = []
    unseen = tuple("abcdefgh")
    reference = run(pipe, STEPS, prompts=unseen)
    for made in (plain, refined):
        with ertacache.apply(pipe, made):
            errors.append((run(pipe, STEPS, prompts=unseen) - reference).square().mean())
    assert errors[1] < 0.5 * errors[0]


def test_generation_ends_where_the_calibration_said():
    pipe = ToyPipeline(curved)
    made = calibrate(pipe, refine=6)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    with ertacache.apply(pipe, made):
        final = pipe(PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="latent")[0]
    runs = recorded()
    torch.testing.assert_close(runs.run(Rerun(made.computed_steps, made.combinations())), final)


def test_a_step_that_leads_away_is_not_taken(monkeypatch):
    runs = recorded()
    coefficients = fitted(runs)
    monkeypatch.setattr(LinearisedRun, "solve", lambda self, rows, ridge: np.full(len(self.places), 3.0))
    refined = refine(runs, linearise(runs, SCHEDULE, coefficients))
    assert refined.coefficients == coefficients and refined.ridge is None


def test_the_ridge_is_chosen_on_prompts_left_out():
    """Two columns, of which one helps the prompts that are solved for and harms all others: it has to be held back."""
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(8, 1, 40)), 0.05 * rng.normal(size=(8, 6, 40))
    columns = np.concatenate([shared, own], axis=1)
    rest = shared[:, 0] + 0.3 * rng.normal(size=(8, 40))
    linear = LinearisedRun(
        SCHEDULE,
        Coefficients.of_outputs([[1.0]]),
        [(0, 0)] * 7,
        np.einsum("pid,pjd->pij", columns, columns),
        np.einsum("pid,pd->pi", columns, rest),
        np.einsum("pd,pd->p", rest, rest),
        np.zeros(7),
    )
    rows = list(range(8))
    ridge = linear.best_ridge(rows)

    def left_out(ridge: float) -> float:
        changes = [linear.solve([r for r in rows if r % 4 != fold], ridge) for fold in range(4)]
        return sum(np.log(linear.errors(changes[p % 4])[p]) for p in rows)

    assert left_out(ridge) == min(map(left_out, RIDGES)) and left_out(ridge) < left_out(RIDGES[0])


def test_a_second_step_goes_where_the_first_one_did_not_reach():
    """It shrinks towards the same step-by-step fit, and ends nearer to its promise."""
    runs = recorded()
    coefficients = Coefficients.of_outputs(fitted(runs).outputs)  # without channels, a poorer start
    linear = linearise(runs, SCHEDULE, coefficients)
    first = refinement._stepped(runs, linear)
    assert first.error - first.promised > refinement.KEPT_PROMISE
    again = linearise(runs, SCHEDULE, first.coefficients, coefficients)
    back = again.changed(again.origin)
    for step, outputs in enumerate(coefficients.outputs):
        assert back.outputs[step] == pytest.approx(outputs) and back.latents_coefficients[step] == pytest.approx(0)
    assert again.solve(range(6), 1e9) == pytest.approx(again.origin, abs=1e-6)
    second = refine(runs, linear)
    assert second.error < first.error
    assert abs(second.error - second.promised) < abs(first.error - first.promised)


def test_a_step_that_keeps_its_promise_is_the_last(monkeypatch):
    runs = recorded()
    monkeypatch.setattr(refinement, "KEPT_PROMISE", 10.0)
    linear = linearise(runs, SCHEDULE, fitted(runs))
    assert refine(runs, linear).linear is linear


def spared() -> int:
    """Evaluations that refinement on 6 prompts may leave out: a ridge at least is tried, and one round is made."""
    return refinement_evaluations(5, 6) - linearisation_evaluations(5, 6) - 5 * 6


def test_announced_evaluations_are_spent():
    pipe = ToyPipeline(curved)
    calibrate(pipe, micro_batch=1, refine=6)
    most = (STEPS + 3 * 5) * 6 + refinement_evaluations(5, 6)
    assert most - spared() <= pipe.transformer.calls <= most
    before = pipe.transformer.calls
    calibrate(pipe, micro_batch=1, search_budget=1)
    choosing = growth_evaluations(STEPS, 6) + form_evaluations(5, 6, folds=2)
    assert pipe.transformer.calls - before == (STEPS + 4 * 5) * 6 + choosing
    before = pipe.transformer.calls
    calibrate(pipe, micro_batch=1, search_budget=4, refine=6)
    most = Work(6, 2, search_budget=4, refine=6).evaluations(STEPS, 5)
    halves = 2 * (refinement_evaluations(5, 3) - linearisation_evaluations(5, 3) - 5 * 3)
    assert most - spared() - halves <= pipe.transformer.calls - before <= most


# -- the choice of the steps -------------------------------------------------------------------------------


def test_growth_is_that_of_the_equation():
    """For a velocity x the state follows x' = x in sigma, which shrinks an error to the ratio of exponentials."""
    pipe = ToyPipeline(lambda x, sigma: x + 3 * torch.sin(5 * sigma))
    runs = recorded_runs(pipe, PROMPTS, seeds=range(6), num_inference_steps=STEPS)
    growth = error_growth(runs)
    for place in growth_places(STEPS):
        wanted = np.prod([1 + runs.recorded.gains[k] for k in range(place + 1, STEPS)])
        assert growth[place] == pytest.approx(wanted, rel=1e-2)
    assert len(growth) == STEPS and growth[0] < growth[-1]


def test_places_of_growth_fit_runs_of_any_length():
    assert growth_places(2) == [0]
    assert growth_places(28) == [0, 5, 10, 16, 21, 26]
    assert all(len(growth_places(n)) >= 1 and max(growth_places(n)) < n - 1 for n in range(2, 40))


def test_a_budget_never_leads_to_a_worse_schedule():
    runs = recorded()
    growth = error_growth(runs)
    plain = choose_schedule(runs, 5, 0, None)
    for budget in (1, 2, 3, 12):
        assert runs.fitted_error(choose_schedule(runs, 5, budget, growth)) <= runs.fitted_error(plain) + 1e-9


def test_tries_of_a_refined_calibration_are_judged_in_the_form_that_the_prompts_are_enough_for():
    runs = recorded()
    form = best_form(runs, choose_schedule(runs, 5, 0, None), folds=2)
    chosen = choose_schedule(runs, 5, 12, error_growth(runs), form)
    assert calibrate(ToyPipeline(curved), refine=6, search_budget=12).computed_steps == chosen


# -- the form under refinement -----------------------------------------------------------------------------


def mixing(latents, sigma):
    """Channels that change at different rates, in directions that are not the channels themselves."""
    turn = torch.linalg.qr(torch.arange(9.0).view(3, 3).sin() + torch.eye(3))[0]
    rates = torch.tensor([0.5, 1.0, 2.0])
    return torch.einsum("pc,bchw->bphw", turn @ torch.diag(rates) @ turn.T, latents) * (0.5 + sigma)


def mixed():
    return recorded_runs(ToyPipeline(mixing), PROMPTS, seeds=range(6), num_inference_steps=STEPS)


def test_where_channels_differ_they_keep_coefficients_of_their_own_under_refinement():
    runs = mixed()
    channels = Form(4, runs.layout)
    assert best_refined_form(runs, [0, 1, 2], [REFINED_FORM, channels]) == channels
    made = calibrate(ToyPipeline(mixing), refine=6, search_budget=1, computed_steps=3)
    plain = calibrate(ToyPipeline(mixing), refine=6, computed_steps=3)  # no tries, so no choice either
    assert made.computed_steps == plain.computed_steps == [0, 1, 2]
    assert made.channel_coefficients is not None and plain.channel_coefficients is None
    assert made.predicted["psnr"] > plain.predicted["psnr"] + 10


def test_the_form_is_judged_on_prompts_that_were_not_fitted_to(monkeypatch):
    """Noise in place of what half of the prompts are fitted to spoils what the other half sees."""
    runs = mixed()
    seen = []
    monkeypatch.setattr(forms, "refine", lambda few, linear: seen.append(len(few)) or refine(few, linear))
    shared, channels = (forms._refined_error(runs, [0, 1, 2], form) for form in (REFINED_FORM, Form(4, runs.layout)))
    assert seen == [3, 3] and channels < shared
    for latents in runs.recorded.latents[1:]:  # what is fitted to is now noise, what judges is as it was
        latents[:3] = torch.randn(latents[:3].shape, generator=torch.Generator().manual_seed(0))
    assert forms._refined_error(runs, [0, 1, 2], Form(4, runs.layout)) > channels + 1


def test_one_form_or_one_prompt_leave_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(forms, "_refined_error", None)  # is not called
    runs = mixed()
    assert best_refined_form(runs, [0, 1, 2], [REFINED_FORM, Form(4)]) == REFINED_FORM
    assert best_refined_form(runs.first(1), [0, 1, 2], [REFINED_FORM, Form(3)]) == REFINED_FORM


# -- the file ----------------------------------------------------------------------------------------------


def test_sample_coefficients_are_kept_and_checked(tmp_path):
    made = calibrate(ToyPipeline(curved), refine=6)
    assert Calibration.load(made.save(tmp_path / "c.json")) == made
    for wrong in ([0.0], "no", [None] * STEPS):
        with pytest.raises(CalibrationError, match="'sample_coefficients'"):
            Calibration.from_dict({**made.to_dict(), "sample_coefficients": wrong})
    assert replace(made, sample_coefficients=None).combinations().latents_coefficients == [0.0] * STEPS
