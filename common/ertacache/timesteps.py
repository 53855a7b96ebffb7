"""Trajectory-aware timestep adjustment of the paper: shorter steps where an output is reused.

Works on the sigmas that the solver integrates, after its shift, or on its timesteps where it has no sigmas. Our
sign convention is diffusers': the noise grid falls from sigma_0 to sigma_N (0 for flow matching), so increments
are negative; only their size is changed here.
"""

from collections.abc import Sequence

MIN_FACTOR = 0.05
# What phi measures the error of reuse by: |o_i|_1, or |o_i - o_{i+1}|_1. Both are quoted; the second is so small at
# many steps that phi is at its minimum wherever steps are reused in a row (docs/method.md).
PHI_OVER = ("output", "change")


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


def timesteps_on(adjusted: Sequence[float], sigmas: Sequence[float], timesteps: Sequence[float]) -> list[float]:
    """The timesteps (N) that the model is given on an adjusted grid: interpolated from the original pairs."""
    pairs = sorted(zip(sigmas, timesteps, strict=False))
    return [_interpolate(sigma, pairs) for sigma in adjusted[: len(timesteps)]]


def _interpolate(sigma: float, pairs: Sequence[tuple[float, float]]) -> float:
    lower = [p for p in pairs if p[0] <= sigma]
    upper = [p for p in pairs if p[0] >= sigma]
    if not lower:
        # below the last timestep: towards timestep 0 at sigma 0
        low_sigma, low_time = 0.0, 0.0
    else:
        low_sigma, low_time = lower[-1]
    if not upper:
        return pairs[-1][1]
    high_sigma, high_time = upper[0]
    if high_sigma == low_sigma:
        return low_time
    return low_time + (high_time - low_time) * (sigma - low_sigma) / (high_sigma - low_sigma)
