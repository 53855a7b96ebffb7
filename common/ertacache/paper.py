"""The published method (arXiv 2508.21091): threshold policy, timestep adjustment, error model.

Everything is measured on the recorded reference runs; no further model call is needed.
"""

from dataclasses import dataclass

from torch import Tensor

from ertacache.error_model import fit_error_model
from ertacache.recording import Recorder, residual_distances, residuals
from ertacache.solver import END_TIMESTEP
from ertacache.threshold import threshold_for, threshold_schedule
from ertacache.timesteps import PHI_OVER, adjust_timesteps, adjustment_factor


@dataclass(frozen=True)
class PaperFit:
    """What the published method takes from the reference runs; the fields of a `Calibration`."""

    computed_steps: list[int]
    threshold: float | None
    step_factors: list[float]
    adjusted_sigmas: list[float] | None
    adjusted_timesteps: list[float] | None
    error_model: list[list[float] | None]


def fit_paper(
    recorded: Recorder,
    *,
    threshold: float | None = None,
    computed_steps: int | None = None,
    schedule: list[int] | None = None,
    rows: list[int] | None = None,
    adjust: bool = True,
    error_model: bool = True,
    phi_over: str = PHI_OVER[0],
) -> PaperFit:
    """Fit the published method to recorded runs, by `threshold`, by `computed_steps`, or on a given `schedule`.

    Args:
        rows: prompts to fit to; None for all.
        adjust, error_model: leave a part out, for ablations.
        phi_over: one of `PHI_OVER`.
    """
    residual = residuals(recorded, rows)
    if schedule is None:
        distances = residual_distances(residual)
        if threshold is None:
            assert computed_steps is not None  # one of the three is given
            threshold = threshold_for(distances, computed_steps)
        schedule = threshold_schedule(distances, threshold)
    chosen = slice(None) if rows is None else rows
    outputs = [o[chosen].float() for o in recorded.outputs]
    latents = [x[chosen].float() for x in recorded.latents]
    factors: list[float] = []
    models: list[list[float] | None] = []
    kept = 0
    for step in range(recorded.num_steps):
        kept = step if step in schedule else kept
        if step == kept:
            factors.append(1.0)
            models.append(None)
            continue
        reused = latents[step] + residual[kept]
        scale = outputs[step] if phi_over == "output" else _change(outputs, step)
        factors.append(adjustment_factor(_l1(reused - outputs[step]), _l1(scale)))
        models.append(list(fit_error_model(reused, outputs[step])) if error_model else None)
    sigmas, timesteps = _adjusted_grid(recorded, factors) if adjust else (None, None)
    if sigmas is None and timesteps is None:
        factors = [1.0] * len(factors)
    return PaperFit(schedule, threshold, factors, sigmas, timesteps, models)


def _adjusted_grid(recorded: Recorder, factors: list[float]) -> tuple[list[float] | None, list[float] | None]:
    """The adjusted sigmas (N + 1), or timesteps (N) where the solver has only these; neither if its grid is fixed."""
    if recorded.sigmas:
        return adjust_timesteps(recorded.sigmas, factors), None
    if recorded.takes_timesteps:
        return None, adjust_timesteps([*recorded.timesteps, END_TIMESTEP], factors)[:-1]
    return None, None


def _change(outputs: list[Tensor], step: int) -> Tensor:
    """o_i - o_{i+1}; the last step has no next output, so there backward."""
    return outputs[step] - outputs[step + 1 if step + 1 < len(outputs) else step - 1]


def _l1(values: Tensor) -> float:
    return float(values.abs().double().mean())
