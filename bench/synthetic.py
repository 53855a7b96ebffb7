"""Calibrations without a calibrating run, for timing: an even schedule and made-up coefficients on the real grid."""

import functools
import inspect
from typing import Any

from step_timer import Call

from compare.recorded import uniform_schedule
from compare.rivals.base import replaced
from ertacache import provenance, solver
from ertacache.calibration import Calibration
from ertacache.fit.step_by_step import OUTPUTS

WEIGHTS = (1.3, -0.4, 0.15, -0.05, 0.02, -0.02)[:OUTPUTS]  # sum to 1, of the size that fitted ones have


class _Seen(Exception):
    """The run has shown what was asked for."""


def grid_and_shape(pipe: Any, call: Call) -> tuple[list[float], list[float], list[int], int]:
    """Timesteps, sigmas, latent shape without the batch, and bytes of a guided output; takes one step of a run."""
    original = pipe.scheduler.step
    found: list[Any] = []

    @functools.wraps(original)
    def looking(*args: Any, **kwargs: Any) -> Any:
        bound = solver.StepSignature.of(inspect.signature(original)).call(args, kwargs)
        output = bound.model_output
        found.extend([list(bound.sample.shape[1:]), output.numel() * output.element_size()])
        raise _Seen

    with replaced(pipe.scheduler, "step", looking):
        try:
            call()
        except _Seen:
            return (*solver.host_grid(pipe.scheduler), *found)
    raise RuntimeError("the pipeline never called its scheduler")


def synthetic_calibration(
    pipe: Any, timesteps: list[float], sigmas: list[float], latent_shape: list[int], computed_steps: int
) -> Calibration:
    """K evenly spread computed steps, and as many coefficients a step as a fitted calibration has."""
    steps = len(timesteps)
    schedule = uniform_schedule(steps, computed_steps)
    rows = [list(WEIGHTS[: min(len(WEIGHTS), sum(s <= step for s in schedule))]) for step in range(steps)]
    return Calibration(
        method="ertacache",
        num_inference_steps=steps,
        computed_steps=schedule,
        timesteps=timesteps,
        sigmas=sigmas,
        scheduler=solver.identity(pipe.scheduler),
        model=provenance.model_identity(pipe.transformer),
        latent_shape=latent_shape,
        dtype=provenance.model_dtype(pipe.transformer),
        coefficients=[[1.0], *rows[1:]],
        guidance_scale=getattr(pipe, "guidance_scale", None),
    )
