"""The fit end to end, and runs with given outputs, on toy pipelines."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from test_attach import run
from toys import ToyPipeline, curved, flow_solver

import ertacache
from compare.recorded import recorded_runs
from ertacache.cache import Coefficients
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.fit import recipe
from ertacache.fit.end_to_end import (
    LATENTS,
    RIDGES,
    LinearisedRun,
    Refined,
    changed,
    fit_end_to_end,
    linearise,
    prompts_within,
)
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs
from ertacache.fit.step_by_step import fit_last_step, fit_step_by_step

pytestmark = pytest.mark.core

PROMPTS = [f"prompt {i}" for i in range(6)]
STEPS = 12
SCHEDULE = [0, 1, 3, 6, 9]


def unipc():
    return flow_solver(UniPCMultistepScheduler, flow_shift=3.0)


SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "unipc": unipc,
    "ddim": partial(DDIMScheduler, clip_sample=False),
}


def recorded(scheduler="euler", **kwargs) -> Runs:
    pipe = ToyPipeline(curved, scheduler=SCHEDULERS[scheduler]())
    return recorded_runs(pipe, PROMPTS, seeds=range(6), num_inference_steps=STEPS, **kwargs)


def fitted(runs, schedule=SCHEDULE) -> Coefficients:
    return fit_step_by_step(runs, schedule)


def calibrate(pipe, **kwargs) -> Calibration:
    kwargs = {"num_inference_steps": STEPS, "seeds": range(6), "progress": False, "computed_steps": 5, **kwargs}
    return ertacache.calibrate(pipe, PROMPTS, **kwargs)


# -- runs made again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_given_outputs_are_not_computed_and_lead_to_the_same_end(scheduler):
    runs = recorded(scheduler)
    calls = runs.pipe.transformer.calls
    steps = list(range(STEPS))
    plain = Coefficients.of_outputs([[1.0]] * STEPS)
    final = runs.latents(Rerun(steps, plain, runs.record.outputs[:8]))
    assert runs.pipe.transformer.calls - calls == STEPS - 8
    torch.testing.assert_close(final, runs.record.latents[-1])
    assert torch.equal(runs.latents(Rerun(steps, plain, runs.record.outputs)), runs.record.latents[-1])


@pytest.mark.parametrize("rows", [[0, 1], [4], [5, 1, 2]])
def test_some_prompts_alone_end_where_they_did(rows):
    runs = recorded()
    few = runs.subset(rows)
    final = few.latents(Rerun(list(range(STEPS)), Coefficients.of_outputs([[1.0]] * STEPS)))
    torch.testing.assert_close(final, runs.record.latents[-1][rows])
    assert few.errors(Rerun(list(range(STEPS)), Coefficients.of_outputs([[1.0]] * STEPS))).max() < 1e-9
    assert [len(few), len(few.record), len(few.record.pixels)] == [len(rows)] * 3


def test_there_are_no_more_first_prompts_than_prompts():
    runs = recorded()
    assert len(runs.first(99)) == len(runs) == 6 and runs.first(2).prompts == PROMPTS[:2]


def test_a_subset_is_fitted_to_its_own_references():
    """Of prompts that are not the first ones: as if they had been recorded alone."""
    rows = [4, 1, 5]
    part = recorded().subset(rows)
    alone = recorded_runs(ToyPipeline(curved), [PROMPTS[row] for row in rows], seeds=rows, num_inference_steps=STEPS)
    for one, other in zip(fitted(part).outputs, fitted(alone).outputs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# -- the linearised run ------------------------------------------------------------------------------------


def test_changes_land_at_their_places():
    before = Coefficients.of_outputs([[1.0], [1.0, 0.0]])
    after = changed(before, [(1, 1), (1, LATENTS), (0, 0)], [0.5, 0.25, -0.125])
    assert (after.outputs, after.latents) == ([[0.875], [1.0, 0.5]], [0.0, 0.25])
    assert before == Coefficients.of_outputs([[1.0], [1.0, 0.0]])


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_the_linearised_run_foretells_small_changes(scheduler):
    runs = recorded(scheduler)
    linear = linearise(runs, SCHEDULE, fitted(runs))
    change = 1e-3 * np.random.default_rng(0).normal(size=len(linear.places))
    final = runs.latents(Rerun(SCHEDULE, linear.changed(change)))
    measured = (final - runs.record.latents[-1]).square().flatten(1).sum(1).numpy()
    assert linear.errors(change) == pytest.approx(measured, rel=0.1)
    assert linear.errors(0 * change) == pytest.approx(linear.squares)


def test_the_newest_outputs_and_the_latents_vary_where_a_segment_ends():
    runs = recorded()
    places = linearise(runs, SCHEDULE, fitted(runs)).places
    counts = {0: 1, 2: 2, 5: 3, 8: 3, 11: 3}  # last step of a segment -> outputs
    assert places == [(end, i) for end, count in counts.items() for i in (*range(count), LATENTS)]


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
    )
    rows = list(range(8))
    ridge = linear.best_ridge(rows)

    def left_out(ridge: float) -> float:
        changes = [linear.solve([r for r in rows if r % 4 != fold], ridge) for fold in range(4)]
        return sum(np.log(linear.errors(changes[p % 4])[p]) for p in rows)

    assert left_out(ridge) == min(map(left_out, RIDGES)) and left_out(ridge) < left_out(RIDGES[0])


# -- the Gauss-Newton step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_it_brings_unseen_prompts_nearer(scheduler):
    pipe = ToyPipeline(curved, scheduler=SCHEDULERS[scheduler]())
    plain, best = calibrate(pipe), calibrate(pipe, effort="best")
    assert best.computed_steps == plain.computed_steps and any(best.sample_coefficients)
    assert best.predicted["psnr"] > plain.predicted["psnr"] + 1
    errors = []
    unseen = tuple("abcdefgh")
    reference = run(pipe, STEPS, prompts=unseen)
    for made in (plain, best):
        with ertacache.apply(pipe, made):
            errors.append((run(pipe, STEPS, prompts=unseen) - reference).square().mean())
    assert errors[1] < 0.6 * errors[0]


def test_generation_ends_where_the_calibration_said():
    pipe = ToyPipeline(curved)
    made = calibrate(pipe, effort="best")
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    with ertacache.apply(pipe, made):
        final = pipe(PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="latent")[0]
    torch.testing.assert_close(recorded().latents(Rerun(made.computed_steps, made.combinations())), final)


def test_a_step_that_leads_away_is_not_taken(monkeypatch):
    runs = recorded()
    start = fitted(runs)
    monkeypatch.setattr(LinearisedRun, "solve", lambda self, rows, ridge: np.full(len(self.places), 3.0))
    refined = fit_end_to_end(runs, SCHEDULE, start)
    assert refined.coefficients == start and refined.ridge is None and refined.without([0]) == start


def test_larger_ridges_are_tried_on_the_run_as_long_as_they_do_better(monkeypatch):
    """Errors of the start and of some ridges, as measured: the third is the best, the one after it ends the search."""
    runs, measured = recorded(), iter([-1.0, -5.0, -6.0, -7.0, -6.5, -9.0])
    linear, asked = linearise(runs, SCHEDULE, fitted(runs)), []
    solve = LinearisedRun.solve
    monkeypatch.setattr(LinearisedRun, "best_ridge", lambda *_: RIDGES[2])
    monkeypatch.setattr(LinearisedRun, "solve", lambda *a: asked.append(a[2]) or solve(*a))
    monkeypatch.setattr(Runs, "errors", lambda *_: 10 ** torch.tensor([next(measured)]))
    assert fit_end_to_end(runs, SCHEDULE, linear.coefficients).ridge == RIDGES[4]
    assert asked == list(RIDGES[2:6])


def test_it_costs_no_more_than_was_allowed():
    runs = recorded(micro_batch=1)
    start = fitted(runs)
    for count in (2, 6):
        # by hand: the run and 8 + 9 + 8 + 4 nudged steps of each, then the start and four ridges on all six
        most = (5 + 29) * count + (1 + 4) * 5 * 6
        assert prompts_within(most, 5, 6) == count and prompts_within(most - 1, 5, 6) == count - 1
        before = runs.pipe.transformer.calls
        fit_end_to_end(runs, SCHEDULE, start, count)
        assert runs.pipe.transformer.calls - before <= most
    assert prompts_within(-10, 5, 6) == 0


def test_prompts_that_were_not_fitted_to_choose_the_ridge(monkeypatch):
    """Of twelve, where there are four of them or more; else the last eight."""
    pipe, judges = ToyPipeline(curved), []
    prompts = [f"prompt {i}" for i in range(12)]
    runs = recorded_runs(pipe, prompts, seeds=range(12), num_inference_steps=STEPS)
    start, errors = fitted(runs), Runs.errors
    monkeypatch.setattr(Runs, "errors", lambda self, cache: judges.append(self.prompts) or errors(self, cache))
    for count, wanted in ((3, prompts[3:11]), (8, prompts[8:]), (9, prompts[4:])):
        judges.clear()
        fit_end_to_end(runs, SCHEDULE, start, count)
        assert judges and all(one == wanted for one in judges)


def test_best_fits_to_no_fewer_than_three_prompts(monkeypatch):
    monkeypatch.setattr(recipe, "fit_end_to_end", lambda *_: pytest.fail("fitted"))
    runs = recorded()
    for left in (0, 2):
        monkeypatch.setattr(recipe, "prompts_within", lambda *_, left=left: left)
        assert recipe._refined(runs, SCHEDULE, fitted(runs)) is None


@pytest.mark.parametrize(("gain", "kept"), [(0.4, False), (0.6, True)])
def test_it_is_kept_where_prompts_left_out_gain_half_a_decibel(monkeypatch, gain, kept):
    runs = recorded()
    monkeypatch.setattr(recipe, "cross_validate", lambda _, fit: {"psnr": 40 + gain * (fit([0, 2, 4]).first > 1)})
    made = recipe.fit(runs, 5, "best")
    assert any(made.sample_coefficients or []) == kept and made.predicted["psnr"] == (40 + gain if kept else 40)
    assert (made.coefficients == recipe.fit(runs, 5, "balanced").coefficients) != kept


# -- what is left out of the fit has no part in it ---------------------------------------------------------


@pytest.fixture(scope="module")
def refined() -> tuple[Runs, Refined]:
    runs = recorded()
    return runs, fit_end_to_end(runs, SCHEDULE, fitted(runs))


def garbled(linear: LinearisedRun, rows: list[int]) -> LinearisedRun:
    """With other numbers for some prompts."""
    parts = {name: getattr(linear, name).copy() for name in ("matrices", "vectors", "squares")}
    for array in parts.values():
        array[rows] = 7 * array[rows] + 1
    return replace(linear, **parts)


def test_prompts_left_out_have_no_part_in_what_is_left(refined):
    _, made = refined
    other = replace(made, linear=garbled(made.linear, [1, 3, 5]))
    assert made.without([1, 3, 5]) == other.without([1, 3, 5]) != made.coefficients
    assert made.without([0, 2, 4]) != other.without([0, 2, 4])


def test_nor_in_a_cross_validated_run(refined):
    """Of the prompts left out, neither the linearised run nor the reference is read."""
    runs, made = refined
    fits = []
    for linear, garble in ((made.linear, False), (garbled(made.linear, [0, 2, 4]), True)):
        latents = [x.clone() for x in runs.record.latents]
        for x in latents if garble else []:
            x[[0, 2, 4]] += 1
        told = replace(runs, record=replace(runs.record, latents=latents))
        cache = recipe._fitted_to(told, [1, 3, 5], SCHEDULE, replace(made, linear=linear))
        runs.latents(cache)
        fits.append(cache.fitted())
    assert fits[0] == fits[1]
    assert fits[0].outputs[-1] != made.coefficients.outputs[-1]


# -- the last step -----------------------------------------------------------------------------------------


def test_the_last_step_is_fitted_once_more():
    """So that fitting it again changes nothing, which it does where the end-to-end fit has moved it."""
    made = calibrate(ToyPipeline(curved), effort="best")
    runs, schedule = recorded(), made.computed_steps
    again = fit_last_step(runs, schedule, made.combinations())
    assert again.outputs[-1] == pytest.approx(made.coefficients[-1], abs=1e-5)
    assert again.outputs[:-1] == made.coefficients[:-1] and again.latents == made.sample_coefficients
    once = fit_end_to_end(runs, schedule, fitted(runs, schedule)).coefficients
    last = fit_last_step(runs, schedule, once)
    assert last.outputs[-1] != pytest.approx(once.outputs[-1], abs=1e-3) and last.outputs[:-1] == once.outputs[:-1]


# -- the file ----------------------------------------------------------------------------------------------


def test_sample_coefficients_are_kept_and_checked(tmp_path):
    made = calibrate(ToyPipeline(curved), effort="best")
    assert Calibration.load(made.save(tmp_path / "c.json")) == made
    for wrong in ([0.0], "no", [None] * STEPS):
        with pytest.raises(CalibrationError, match="'sample_coefficients'"):
            Calibration.from_dict({**made.to_dict(), "sample_coefficients": wrong})
    assert replace(made, sample_coefficients=None).combinations().latents == [0.0] * STEPS
