"""Calibration end to end on toy pipelines whose answers are known, for both methods."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import UniPCMultistepScheduler
from test_attach import run
from toys import ToyPipeline, curved, flow_solver, linear_in_sigma

import ertacache
from compare.recorded import recorded_runs
from ertacache.attach import attached
from ertacache.cache import Cache, Coefficients
from ertacache.errors import CalibrationError
from ertacache.fit import recipe
from ertacache.fit.predict import folds_of, mean_range
from ertacache.fit.record import gram_matrix
from ertacache.fit.step_by_step import OUTPUTS, fit_step_by_step
from ertacache.published import PHI_OVER
from ertacache.replay import cache_of

pytestmark = pytest.mark.core

PROMPTS = [f"prompt {i}" for i in range(6)]


def calibrate(pipe, **kwargs):
    kwargs = {"num_inference_steps": 12, "seeds": range(6), "progress": False, **kwargs}
    return ertacache.calibrate(pipe, PROMPTS, **kwargs)


def error(pipe, calibration, steps=12) -> float:
    """Error on prompts and seeds that were not calibrated on."""
    reference = run(pipe, steps, prompts=tuple("abcdefgh"))
    with ertacache.apply(pipe, calibration):
        return float((run(pipe, steps, prompts=tuple("abcdefgh")) - reference).abs().max())


def test_a_velocity_linear_in_sigma_is_reproduced_exactly():
    """Two cached outputs span a linear function, so that every later step is predicted without error."""
    pipe = ToyPipeline(linear_in_sigma)
    assert error(pipe, calibrate(pipe, computed_steps=3)) < 1e-3


def test_rectification_beats_plain_reuse_on_the_same_steps():
    pipe = ToyPipeline(curved)
    made = calibrate(pipe, computed_steps=5)
    plain = {**made.__dict__, "coefficients": [[1.0]] * 12}
    assert error(pipe, made) < 0.1 * error(pipe, ertacache.Calibration(**plain))


def test_it_carries_over_to_a_multistep_solver_with_a_corrector():
    scheduler = flow_solver(UniPCMultistepScheduler, flow_shift=3.0)
    pipe = ToyPipeline(curved, scheduler=scheduler)
    made = calibrate(pipe, computed_steps=6)
    plain = {**made.__dict__, "coefficients": [[1.0]] * 12}
    assert error(pipe, made) < 0.2 * error(pipe, ertacache.Calibration(**plain))


def test_paper_method_runs_on_its_adjusted_grid():
    pipe = ToyPipeline(curved)
    made = calibrate(pipe, computed_steps=6, method="paper")
    assert len(made.computed_steps) <= 6 and made.threshold > 0
    assert made.adjusted_sigmas[0] == 1.0 and made.adjusted_sigmas[-1] == 0.0
    seen = []
    original = pipe.transformer.velocity
    pipe.transformer.velocity = lambda x, s: (seen.append(float(s.flatten()[0])), original(x, s))[1]
    with ertacache.apply(pipe, made):
        run(pipe, 12)
    assert seen == pytest.approx([made.adjusted_sigmas[i] for i in made.computed_steps], abs=1e-5)


def test_the_adjustment_is_offered_in_both_of_its_definitions():
    """The change of a smooth output in one step is less than the output itself, so phi over it is smaller."""
    kwargs = {"method": "paper", "computed_steps": 4, "num_inference_steps": 8, "progress": False}
    made = {over: ertacache.calibrate(ToyPipeline(curved), ["a", "b"], phi_over=over, **kwargs) for over in PHI_OVER}
    assert made["output"].computed_steps == made["change"].computed_steps
    assert {over: one.settings["phi_over"] for over, one in made.items()} == {over: over for over in PHI_OVER}
    reused = [step for step in range(8) if step not in made["output"].computed_steps]
    pairs = [tuple(made[over].step_factors[i] for over in PHI_OVER) for i in reused]
    assert any(a > b for a, b in pairs), pairs
    default = ertacache.calibrate(ToyPipeline(curved), ["a", "b"], **kwargs)
    assert default.step_factors == made["output"].step_factors
    with pytest.raises(CalibrationError, match="output, change"):
        ertacache.calibrate(ToyPipeline(curved), ["a"], phi_over="both", **kwargs)


def test_paper_threshold_is_taken_as_given():
    pipe = ToyPipeline(curved)
    assert calibrate(pipe, method="paper", threshold=1e-9).computed_steps == list(range(12))
    assert calibrate(pipe, method="paper", threshold=1e9).computed_steps == [0]


def test_speedup_and_min_psnr_choose_the_number_of_steps():
    pipe = ToyPipeline(curved)
    assert len(calibrate(pipe, speedup=2.0).computed_steps) == 6
    made = calibrate(pipe, min_psnr=60.0)
    assert made.predicted["psnr"] >= 60.0
    fewer = calibrate(pipe, computed_steps=len(made.computed_steps) - 1)
    assert fewer.predicted["psnr"] < 60.0


def test_more_effort_brings_more_and_the_least_predicts_nothing():
    pipe = ToyPipeline(curved)
    fast, balanced, best = (calibrate(pipe, computed_steps=5, effort=effort) for effort in recipe.EFFORTS)
    assert fast.predicted is None and balanced.predicted["psnr"] + 1 < best.predicted["psnr"]
    assert [made.settings["effort"] for made in (fast, balanced, best)] == ["fast", "balanced", "best"]
    assert error(pipe, best) < 0.9 * error(pipe, balanced)


@pytest.mark.parametrize("method", ["ertacache", "paper"])
def test_the_predicted_quality_is_that_of_prompts_left_out(method):
    """By hand: each half is calibrated on alone, and the other half generated with that."""
    made = calibrate(ToyPipeline(curved), computed_steps=4, method=method)
    psnrs = []
    for fold in range(2):
        rest, left_out = (list(range(start, 6, 2)) for start in (1 - fold, fold))
        pipe = ToyPipeline(curved)
        runs = recorded_runs(pipe, [PROMPTS[i] for i in rest], seeds=rest, num_inference_steps=12)
        if method == "ertacache":
            fit = replace(made, coefficients=fit_step_by_step(runs, made.computed_steps).outputs)
        else:
            fit = recipe.fit_paper(runs, len(made.computed_steps), None, PHI_OVER[0], "fast")
        pixels = []
        for cache in (Cache(range(12), Coefficients.of_outputs([[1.0]] * 12)), cache_of(fit)):
            generators = [torch.Generator().manual_seed(i) for i in left_out]
            with attached(pipe, cache.begin):
                pixels.append(pipe([PROMPTS[i] for i in left_out], generator=generators, num_inference_steps=12)[0])
        psnrs += (-10 * (pixels[0] - pixels[1]).square().flatten(1).mean(1).log10()).tolist()
    assert made.predicted["psnr"] == pytest.approx(np.mean(psnrs), abs=0.02) and made.predicted["folds"] == 2
    assert made.predicted["psnr_p10"] < made.predicted["psnr"]


def test_seeds_of_a_prompt_are_left_out_together():
    class Four(SimpleNamespace):
        def __len__(self):
            return 4

    def folds(*prompts):
        return folds_of(Four(prompts=prompts))

    assert folds("a", "b", "c", "d") == [0, 1, 0, 1]
    assert folds("a", "a", "b", "b") == [0, 0, 1, 1] and folds("a", "b", "a", "b") == [0, 1, 0, 1]
    assert folds("a", "b", "c", "a") == [0, 1, 0, 0]
    assert folds("a", "a", "a", "a") == folds(None, None, None, None) == folds("a", "b") == [0, 1, 0, 1]


def test_the_range_of_the_prediction_holds_nine_times_of_ten():
    generator = torch.Generator().manual_seed(0)
    held = []
    for values in 4 * torch.randn(2000, 8 + 24, generator=generator):
        low, high = mean_range(values[:8])
        held.append(low <= float(values[8:].mean()) <= high)
    assert 0.88 < np.mean(held) < 0.92


def test_the_range_of_the_prediction_is_students():
    values = torch.tensor([50.0, 41.0, 44.0, 48.0, 39.0, 52.0, 47.0, 43.0])
    interval = scipy.stats.t.interval(
        0.9, 7, loc=float(values.mean()), scale=float(values.std()) * (1 / 8 + 1 / 24) ** 0.5
    )
    assert mean_range(values) == pytest.approx(list(interval), abs=0.05)
    made = calibrate(ToyPipeline(curved), computed_steps=4)
    low, high = made.predicted["psnr_range"]
    assert low < made.predicted["psnr"] < high and f"({low:.1f} to {high:.1f})" in made.summary()


def state(pipe) -> tuple:
    """What a calibration could have changed."""
    parts = [pipe, pipe.transformer, pipe.scheduler]
    values = [p.tolist() for p in pipe.transformer.parameters()]
    return [type(part) for part in parts], [sorted(vars(part)) for part in parts[:2]], values


@pytest.mark.parametrize("effort", recipe.EFFORTS)
def test_the_pipeline_is_as_it_was(effort):
    pipe = ToyPipeline(curved)
    before, was = run(pipe, 12), state(pipe)
    scheduler = sorted(vars(pipe.scheduler))
    calibrate(pipe, computed_steps=5, effort=effort)
    assert state(pipe) == was and sorted(vars(pipe.scheduler)) == scheduler
    assert torch.equal(run(pipe, 12), before)


def test_an_interrupted_calibration_leaves_the_pipeline_as_it_was():
    pipe = ToyPipeline(curved)
    before, was = run(pipe, 12), state(pipe)
    pipe.interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, computed_steps=5)
    pipe.interrupt_at = None
    assert state(pipe) == was and torch.equal(run(pipe, 12), before)


def test_a_caller_in_inference_mode_changes_nothing():
    wanted = calibrate(ToyPipeline(curved), computed_steps=5)
    with torch.inference_mode():
        assert calibrate(ToyPipeline(curved), computed_steps=5) == wanted


def test_calibration_is_deterministic():
    pipe = ToyPipeline(curved)
    assert calibrate(pipe, computed_steps=5) == calibrate(pipe, computed_steps=5)


def test_every_step_but_the_first_is_fitted_to_as_many_outputs_as_there_are():
    made = calibrate(ToyPipeline(curved), computed_steps=7)
    seen = [min(sum(k <= step for k in made.computed_steps), OUTPUTS) for step in range(12)]
    assert made.computed_steps[-1] < 11 and max(seen) == OUTPUTS
    assert list(map(len, made.coefficients)) == seen
    assert [row == [1.0] for row in made.coefficients] == [step == 0 for step in range(12)]


def test_micro_batches_change_nothing():
    pipe = ToyPipeline(curved)
    a, b = calibrate(pipe, computed_steps=5, micro_batch=1), calibrate(pipe, computed_steps=5, micro_batch=64)
    assert a.computed_steps == b.computed_steps
    for one, other in zip(a.coefficients, b.coefficients, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_one_prompt_has_no_prediction_and_still_calibrates():
    made = ertacache.calibrate(ToyPipeline(curved), "p", computed_steps=4, num_inference_steps=12, progress=False)
    assert made.predicted is None and made.prompts["count"] == 1


def test_one_computed_step_is_still_better_than_its_plain_reuse():
    pipe = ToyPipeline(curved)
    made = calibrate(pipe, computed_steps=1)
    assert error(pipe, made) < 0.9 * error(pipe, replace(made, coefficients=[[1.0]] * 12))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "exactly one of"),
        ({"speedup": 2.0, "computed_steps": 3}, "speedup, computed_steps"),
        ({"threshold": 0.1}, "belongs to method='paper'"),
        ({"computed_steps": 13}, "between 1 and 12"),
        ({"computed_steps": 3, "method": "magic"}, "'magic'"),
        ({"computed_steps": 3, "effort": "most"}, "effort is 'most': it must be one of fast, balanced, best"),
        ({"min_psnr": 30.0, "effort": "fast"}, "min_psnr needs a prediction"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    pipe = ToyPipeline(curved)
    with pytest.raises(CalibrationError, match=message):
        calibrate(pipe, **request_)
    assert "_ertacache" not in pipe.__dict__


def test_the_gram_matrix_by_hand():
    outputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])]
    assert gram_matrix(outputs).tolist() == [[0.5, 0.5], [0.5, 2.5]]
