"""Fit the published method (arXiv 2508.21091): threshold policy, timestep adjustment, error model.

Everything is measured on the recorded runs; no further model call is needed. Our sign convention is diffusers': the
noise grid falls from sigma_0 to sigma_N (0 for flow matching), so increments are negative; only their size changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ertacache.calibration import check_computed_steps
from ertacache.fit.record import Array, Record
from ertacache.published import MIN_FACTOR, PHI_OVER
from ertacache.solver import END_TIMESTEP


@dataclass(frozen=True)
class PublishedFit:
    """What the published method takes from the reference runs; the fields of a `Calibration`."""

    computed_steps: list[int]
    threshold: float | None
    step_factors: list[float]
    adjusted_sigmas: list[float] | None
    adjusted_timesteps: list[float] | None
    error_model: list[list[float] | None]


def fit_published(
    record: Record,
    *,
    threshold: float | None = None,
    computed_steps: int | None = None,
    schedule: list[int] | None = None,
    adjust: bool = True,
    error_model: bool = True,
    phi_over: str = PHI_OVER[0],
) -> PublishedFit:
    """Fit the published method to recorded runs, by `threshold`, by `computed_steps`, or on a given `schedule`.

    Args:
        adjust, error_model: leave a part out, for ablations.
        phi_over: one of `PHI_OVER`.
    """
    residual = residuals(record)
    if schedule is None:
        distances = residual_distances(residual)
        if threshold is None:
            assert computed_steps is not None  # one of the three is given
            threshold = threshold_for(distances, computed_steps)
        schedule = threshold_schedule(distances, threshold)
    outputs = [o.float() for o in record.outputs]
    latents = [x.float() for x in record.latents]
    factors: list[float] = []
    models: list[list[float] | None] = []
    kept = 0
    for step in range(record.num_steps):
        kept = step if step in schedule else kept
        if step == kept:
            factors.append(1.0)
            models.append(None)
            continue
        reused = latents[step] + residual[kept]
        scale = outputs[step] if phi_over == "output" else _change(outputs, step)
        factors.append(adjustment_factor(_l1(reused - outputs[step]), _l1(scale)))
        models.append(list(fit_error_model(reused, outputs[step])) if error_model else None)
    sigmas, timesteps = _adjusted_grid(record, factors) if adjust else (None, None)
    if sigmas is None and timesteps is None:
        factors = [1.0] * len(factors)
    return PublishedFit(schedule, threshold, factors, sigmas, timesteps, models)


def _adjusted_grid(record: Record, factors: list[float]) -> tuple[list[float] | None, list[float] | None]:
    """The adjusted sigmas (N + 1), or timesteps (N) where the solver has only these; neither if its grid is fixed."""
    if record.sigmas:
        return adjust_timesteps(record.sigmas, factors), None
    if record.takes_timesteps:
        return None, adjust_timesteps([*record.timesteps, END_TIMESTEP], factors)[:-1]
    return None, None


def _change(outputs: list[Tensor], step: int) -> Tensor:
    """o_i - o_{i+1}; the last step has no next output, so there backward."""
    return outputs[step] - outputs[step + 1 if step + 1 < len(outputs) else step - 1]


def _l1(values: Tensor) -> float:
    return float(values.abs().double().mean())


def residuals(record: Record) -> list[Tensor]:
    """r_i = o_i - x_i for all steps, float32."""
    return [o.float() - x.float() for o, x in zip(record.outputs, record.latents, strict=False)]


def residual_distances(residual: list[Tensor]) -> Array:
    """D[j, i] = |r_j - r_i|_1 / |r_i|_1 for all pairs, the norms averaged over prompts; (N, N) float64."""
    num_steps = len(residual)
    distances = np.zeros((num_steps, num_steps))
    norms = [float(r.abs().double().mean()) for r in residual]
    for j in range(num_steps):
        for i in range(j + 1, num_steps):
            difference = float((residual[j] - residual[i]).abs().double().mean())
            distances[j, i] = difference / max(norms[i], 1e-12)
            distances[i, j] = difference / max(norms[j], 1e-12)
    return distances


def threshold_schedule(distances: Array, threshold: float) -> list[int]:
    """The paper's policy: reuse the kept residual while it is closer than `threshold`, else compute.

    Args:
        distances: (N, N), distances[j, i] = |r_j - r_i|_1 / |r_i|_1 with residuals r = o - x.
    """
    schedule = [0]
    for step in range(1, len(distances)):
        if not distances[schedule[-1], step] < threshold:
            schedule.append(step)
    return schedule


def threshold_for(distances: Array, computed_steps: int) -> float:
    """The threshold at which `threshold_schedule` computes K steps, or the next smaller number it can reach.

    The number of computed steps falls with the threshold except for small ripples, so bisection finds it.
    """
    check_computed_steps(len(distances), computed_steps)
    low, high = 0.0, float(np.max(distances)) * 1.01 + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        if len(threshold_schedule(distances, middle)) <= computed_steps:
            high = middle
        else:
            low = middle
    return high


def adjustment_factor(reuse_error: float, scale: float) -> float:
    """phi = clip(1 - |o~_i - o_i|_1 / scale, MIN_FACTOR, 1); the scale is one of `PHI_OVER`.

    The paper clips at 0; a zero step would repeat a sigma, which multistep solvers turn into NaN.
    """
    if scale <= 0:
        return MIN_FACTOR if reuse_error > 0 else 1.0
    return min(1.0, max(MIN_FACTOR, 1.0 - reuse_error / scale))


def adjust_timesteps(sigmas: Sequence[float], factors: Sequence[float]) -> list[float]:
    """The adjusted grid (N + 1), known before the run since the reused steps and factors are.

    Step i takes phi_i dt_c (phi = 1 on computed steps). dt_c is derived anew after each step: what is left of
    the axis is spread over the steps that are left, in proportion to their original increments. The last step
    takes all that is left, so that the run ends where the original grid does.

    Args:
        sigmas: the original grid, N + 1 falling values.
        factors: phi_i for each of the N steps.
    """
    adjusted = [float(sigmas[0])]
    end = float(sigmas[-1])
    for step, factor in enumerate(factors):
        original_left = end - sigmas[step]
        share = (sigmas[step + 1] - sigmas[step]) / original_left
        adjusted.append(adjusted[-1] + factor * share * (end - adjusted[-1]))
    adjusted[-1] = end
    return adjusted


def fit_error_model(reused: Tensor, output: Tensor) -> tuple[float, float]:
    """K and B of the paper's error model e = sigma(K o~ + B), linearised: sigma(z) ~ z / 4 + 1 / 2.

    The error e = o~ - o of the reused output o~ then has slope K / 4 and intercept B / 4 + 1 / 2 in o~, both
    found by ordinary least squares (arXiv 2508.21091, closed-form rectification).
    """
    x, error = reused.double().flatten(), (reused.double() - output.double()).flatten()
    centred = x - x.mean()
    variance = centred.square().mean()
    slope = float((centred * error).mean() / variance) if variance > 0 else 0.0
    intercept = float(error.mean()) - slope * float(x.mean())
    return 4 * slope, 4 * (intercept - 0.5)
