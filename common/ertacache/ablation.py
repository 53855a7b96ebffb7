"""The parts of the method as calibrations, one a row; a row that begins with + adds one thing to the row before."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ertacache import policy
from ertacache.ablation_schedules import best_schedule, reuse_errors, uniform_schedule
from ertacache.calibrate import plain_calibration
from ertacache.calibration import Calibration, calibration_fields
from ertacache.fitting import REFINED_FORM, SAFE_FORM, Fitter, Form
from ertacache.maker import Maker
from ertacache.paper import fit_paper
from ertacache.recording import gram_matrix, residual_distances, residuals
from ertacache.replay import Replay
from ertacache.runs import Runs
from ertacache.threshold import threshold_for, threshold_schedule
from ertacache.timesteps import PHI_OVER

SWAPS_PER_TRY = 8


def ablations(
    runs: Runs,
    computed_steps: int,
    searched: list[int],
    search_budget: int,
    refine: int = 0,
    phi_over: str = PHI_OVER[0],
) -> dict[str, Calibration]:
    """Name -> calibration, in the order of the table.

    Args:
        runs: recorded calibration runs.
        searched: our method's schedule.
        search_budget: of our method; the swap search on plain reuse gets SWAPS_PER_TRY as many, since each of its tries
            moves a single step, and ours a whole schedule.
        refine: prompts of the row that is fitted end to end, which is left out without any.
        phi_over: which of its definitions the timestep adjustment takes.
    """
    recorded = runs.recorded
    uniform = uniform_schedule(recorded.num_steps, computed_steps)
    distances = residual_distances(residuals(recorded))
    threshold = threshold_schedule(distances, threshold_for(distances, computed_steps))
    errors = reuse_errors(gram_matrix(recorded.outputs), np.asarray(recorded.gains))
    dynamic = best_schedule(errors, computed_steps)
    swapped = dynamic
    if search_budget:
        swapped = policy.swap_search(
            dynamic,
            lambda s: runs.final_error(Replay(residual_reuse(runs, s), runs.pipe)),
            recorded.num_steps,
            SWAPS_PER_TRY * search_budget,
        )
    rows = {
        "uniform schedule, residual reuse": residual_reuse(runs, uniform),
        "threshold policy, residual reuse": residual_reuse(runs, threshold),
        "dynamic programming, residual reuse": residual_reuse(runs, dynamic),
        "+ swap search": residual_reuse(runs, swapped),
        "+ timestep adjustment": _paper(runs, swapped, adjust=True, error_model=False, phi_over=phi_over),
        "+ paper rectification": _paper(runs, swapped, adjust=True, error_model=True, phi_over=phi_over),
        "dynamic programming, output reuse": _outputs(runs, dynamic, [[1.0]] * recorded.num_steps),
        "dynamic programming, linear extrapolation": linear_extrapolation(runs, dynamic),
        "our schedule, linear extrapolation": linear_extrapolation(runs, searched),
        "dynamic programming, rectification to the reference": _fitted(runs, dynamic, on_computed=False),
        "+ on computed steps": _fitted(runs, dynamic, on_computed=True),
        "+ our schedule": _fitted(runs, searched, on_computed=True),
        "+ coefficients of channels": _fitted(
            runs, searched, on_computed=True, form=Form(SAFE_FORM.outputs, runs.layout)
        ),
        "our schedule, four outputs": _fitted(runs, searched, on_computed=True, form=REFINED_FORM),
    }
    if refine:
        rows["+ fitted end to end"] = _end_to_end(runs, searched, refine)
    return rows


def residual_reuse(runs: Runs, schedule: list[int]) -> Calibration:
    """Plain reuse of the last computed residual o - x on the original grid."""
    return _paper(runs, schedule, adjust=False, error_model=False)


def linear_extrapolation(runs: Runs, schedule: list[int]) -> Calibration:
    """The line through the last two computed outputs, over sigma (or timestep where there are no sigmas)."""
    recorded = runs.recorded
    axis = recorded.sigmas or recorded.timesteps
    rows: list[list[float]] = []
    last: list[int] = []
    for step in range(recorded.num_steps):
        if step in schedule:
            last = [step, *last][:2]
            rows.append([1.0])
        elif len(last) < 2:
            rows.append([1.0])
        else:
            slope = (axis[step] - axis[last[0]]) / (axis[last[0]] - axis[last[1]])
            rows.append([1 + slope, -slope])
    return _outputs(runs, schedule, rows)


def _paper(runs: Runs, schedule: list[int], **parts: Any) -> Calibration:
    fit = fit_paper(runs.recorded, schedule=schedule, **parts)
    return plain_calibration(runs, method="paper", **asdict(fit))


def _outputs(runs: Runs, schedule: list[int], coefficients: list[list[float]]) -> Calibration:
    return plain_calibration(runs, method="ertacache", computed_steps=schedule, coefficients=coefficients)


def _fitted(runs: Runs, schedule: list[int], on_computed: bool, form: Form = SAFE_FORM) -> Calibration:
    fitter = Fitter(schedule, runs.recorded.latents, on_computed=on_computed, form=form)
    runs.run(fitter)
    fields = calibration_fields(fitter.fitted())
    return plain_calibration(runs, method="ertacache", computed_steps=schedule, **fields)


def _end_to_end(runs: Runs, schedule: list[int], refine: int) -> Calibration:
    maker = Maker(runs, "ertacache", None, search_budget=0, refine=refine, folds=0, form=REFINED_FORM)
    fields = calibration_fields(maker.end_to_end(schedule))
    return plain_calibration(runs, method="ertacache", computed_steps=schedule, **fields)
