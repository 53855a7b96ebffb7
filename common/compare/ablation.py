"""The parts of the method as calibrations, one a row; a row that begins with + adds one thing to the row before."""

from dataclasses import asdict
from typing import Any

import numpy as np

from compare.ablation_schedules import best_schedule, reuse_errors, uniform_schedule
from ertacache.cache import Coefficients
from ertacache.calibration import Calibration, calibration_fields
from ertacache.fit.end_to_end import fit_end_to_end
from ertacache.fit.published import fit_published, residual_distances, residuals, threshold_for, threshold_schedule
from ertacache.fit.recipe import plain_calibration
from ertacache.fit.record import gram_matrix
from ertacache.fit.runs import Runs, mean_log_error
from ertacache.fit.schedule import swap_search
from ertacache.fit.step_by_step import REFINED_FORM, SAFE_FORM, Form, StepFit, fit_last_step, fit_step_by_step
from ertacache.published import PHI_OVER
from ertacache.replay import cache_of

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
    record = runs.record
    uniform = uniform_schedule(record.num_steps, computed_steps)
    distances = residual_distances(residuals(record))
    threshold = threshold_schedule(distances, threshold_for(distances, computed_steps))
    errors = reuse_errors(gram_matrix(record.outputs), np.asarray(record.gains))
    dynamic = best_schedule(errors, computed_steps)
    swapped = dynamic
    if search_budget:
        swapped = swap_search(
            dynamic,
            lambda s: mean_log_error(runs.errors(cache_of(residual_reuse(runs, s)))),
            record.num_steps,
            SWAPS_PER_TRY * search_budget,
        )
    rows = {
        "uniform schedule, residual reuse": residual_reuse(runs, uniform),
        "threshold policy, residual reuse": residual_reuse(runs, threshold),
        "dynamic programming, residual reuse": residual_reuse(runs, dynamic),
        "+ swap search": residual_reuse(runs, swapped),
        "+ timestep adjustment": _paper(runs, swapped, adjust=True, error_model=False, phi_over=phi_over),
        "+ paper rectification": _paper(runs, swapped, adjust=True, error_model=True, phi_over=phi_over),
        "dynamic programming, output reuse": _outputs(runs, dynamic, [[1.0]] * record.num_steps),
        "dynamic programming, linear extrapolation": linear_extrapolation(runs, dynamic),
        "our schedule, linear extrapolation": linear_extrapolation(runs, searched),
        "dynamic programming, rectification to the reference": _fitted(runs, dynamic, on_computed=False),
        "+ on computed steps": _fitted(runs, dynamic, on_computed=True),
        "+ our schedule": _fitted(runs, searched, on_computed=True),
        "+ coefficients of channels": _fitted(
            runs, searched, on_computed=True, form=Form(SAFE_FORM.outputs, runs.record.layout)
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
    record = runs.record
    axis = record.sigmas or record.timesteps
    rows: list[list[float]] = []
    last: list[int] = []
    for step in range(record.num_steps):
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
    fit = fit_published(runs.record, schedule=schedule, **parts)
    return plain_calibration(runs, method="paper", **asdict(fit))


def _outputs(runs: Runs, schedule: list[int], coefficients: list[list[float]]) -> Calibration:
    return plain_calibration(runs, method="ertacache", computed_steps=schedule, coefficients=coefficients)


def _fitted(runs: Runs, schedule: list[int], on_computed: bool, form: Form = SAFE_FORM) -> Calibration:
    fit = StepFit(schedule, runs.record.latents, on_computed=on_computed, form=form)
    runs.latents(fit)
    return _combined(runs, schedule, fit.fitted())


def _end_to_end(runs: Runs, schedule: list[int], refine: int) -> Calibration:
    start = fit_step_by_step(runs, schedule, REFINED_FORM)
    refined = fit_end_to_end(runs.first(refine), schedule, start)
    if refined.ridge is None:
        return _combined(runs, schedule, start)
    return _combined(runs, schedule, fit_last_step(runs, schedule, refined.coefficients, REFINED_FORM))


def _combined(runs: Runs, schedule: list[int], coefficients: Coefficients) -> Calibration:
    return plain_calibration(runs, method="ertacache", computed_steps=schedule, **calibration_fields(coefficients))
