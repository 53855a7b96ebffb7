"""Make the rows of the ablation, one calibration each; a row that begins with + adds one thing to the row before."""

from dataclasses import asdict
from typing import Any

import numpy as np

from compare.ablation_schedules import best_schedule, reuse_errors, uniform_schedule
from compare.recorded import plain_calibration
from ertacache.calibration import Calibration, calibration_fields
from ertacache.fit.published import fit_published, residual_distances, residuals, threshold_for, threshold_schedule
from ertacache.fit.record import gram_matrix
from ertacache.fit.runs import Runs
from ertacache.fit.step_by_step import StepFit
from ertacache.published import PHI_OVER


def ablations(runs: Runs, ours: list[int], phi_over: str = PHI_OVER[0]) -> dict[str, Calibration]:
    """Return name -> calibration, in the order of the table.

    Args:
        runs: recorded calibration runs.
        ours: our schedule.
        phi_over: definition of the timestep adjustment.
    """
    record, computed_steps = runs.record, len(ours)
    uniform = uniform_schedule(record.num_steps, computed_steps)
    distances = residual_distances(residuals(record))
    threshold = threshold_schedule(distances, threshold_for(distances, computed_steps))
    errors = reuse_errors(gram_matrix(record.outputs), np.asarray(record.gains))
    dynamic = best_schedule(errors, computed_steps)
    return {
        "uniform schedule, residual reuse": residual_reuse(runs, uniform),
        "threshold policy, residual reuse": residual_reuse(runs, threshold),
        "dynamic programming, residual reuse": residual_reuse(runs, dynamic),
        "+ timestep adjustment": _paper(runs, dynamic, adjust=True, error_model=False, phi_over=phi_over),
        "+ paper rectification": _paper(runs, dynamic, adjust=True, error_model=True, phi_over=phi_over),
        "dynamic programming, output reuse": _outputs(runs, dynamic, [[1.0]] * record.num_steps),
        "dynamic programming, linear extrapolation": linear_extrapolation(runs, dynamic),
        "our schedule, linear extrapolation": linear_extrapolation(runs, ours),
        "uniform schedule, fitted": _fitted(runs, uniform),
        "dynamic programming, fitted": _fitted(runs, dynamic),
        "our schedule, fitted on reused steps": _fitted(runs, ours, on_computed=False),
        "our schedule, three outputs": _fitted(runs, ours, outputs=3),
        "our schedule, fitted": _fitted(runs, ours),
    }


def residual_reuse(runs: Runs, schedule: list[int]) -> Calibration:
    """Plain reuse of the last computed residual o - x on the original grid."""
    return _paper(runs, schedule, adjust=False, error_model=False)


def linear_extrapolation(runs: Runs, schedule: list[int]) -> Calibration:
    """Extrapolate the last two computed outputs linearly, over sigma (or timestep without sigmas)."""
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


def _fitted(runs: Runs, schedule: list[int], **options: Any) -> Calibration:
    fit = StepFit(schedule, runs.record.latents, **options)
    runs.latents(fit)
    fields = calibration_fields(fit.fitted())
    return plain_calibration(runs, method="ertacache", computed_steps=schedule, **fields)
