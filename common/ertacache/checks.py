"""Refuse a calibration that does not belong to a pipeline or a run; warn if that costs quality only."""

import warnings
from collections.abc import Sequence
from typing import Any

from ertacache import provenance, solver
from ertacache.calibration import Calibration
from ertacache.errors import MismatchError, MismatchWarning
from ertacache.schema import printable, shown

GRID_TOLERANCE = 0.05  # in timesteps of 0 .. 1000
AGAIN = "calibrate again for it (ertacache.calibrate, or run.sh with the new setting)"


def check_pipeline(calibration: Calibration, pipe: Any) -> None:
    """Raise MismatchError for another model or scheduler; warn for other weights or dtype."""
    check_model(calibration, pipe.transformer)
    check_scheduler(calibration, pipe.scheduler)
    check_weights(calibration, pipe.transformer)


def check_model(calibration: Calibration, transformer: Any) -> None:
    """Raise MismatchError for a transformer of another class or configuration."""
    present = provenance.class_name(transformer)
    if present != calibration.model["class"]:
        raise MismatchError(
            f"the calibration is for {printable(calibration.model['class'])}, the pipeline has {present}: {AGAIN}"
        )
    wanted = calibration.model.get("config_sha256")
    if wanted and provenance.config_hash(transformer) != wanted:
        raise MismatchError(
            f"the {present} has another configuration than the calibrated one "
            f"({printable(calibration.model.get('id'))}): {AGAIN}"
        )


def check_weights(calibration: Calibration, transformer: Any) -> None:
    """Warn for a transformer in another dtype or with other weights."""
    dtype = provenance.model_dtype(transformer)
    if dtype != calibration.dtype:
        warn(
            f"the transformer runs in {dtype}, the calibration was made in {printable(calibration.dtype)}: "
            "quality may be lower"
        )
        return
    fingerprint = provenance.weights_fingerprint(transformer)
    wanted = calibration.model.get("weights_fingerprint")
    if wanted and fingerprint and fingerprint != wanted:
        warn(
            "the weights differ from the calibrated ones (LoRA, quantised, fine-tuned?): quality may be lower; "
            "calibrate again to restore it"
        )


class WeightsWatch:
    """Notice a LoRA that is loaded or fused, or other changes of the weights, between runs."""

    def __init__(self, calibration: Calibration, pipe: Any):
        self.calibration, self.pipe = calibration, pipe
        self.seen = self._fingerprint()

    def check(self) -> None:
        """Warn if the weights changed since the last look and are not the calibrated ones."""
        present = self._fingerprint()
        if present != self.seen:
            self.seen = present
            check_weights(self.calibration, self.pipe.transformer)

    def _fingerprint(self) -> str | None:
        known = self.calibration.model.get("weights_fingerprint")
        return provenance.weights_fingerprint(self.pipe.transformer) if known else None


def check_scheduler(calibration: Calibration, scheduler: Any) -> None:
    """Raise MismatchError for a scheduler of another class or with other settings."""
    present = solver.identity(scheduler)
    if present["class"] != calibration.scheduler["class"]:
        raise MismatchError(
            f"the calibration is for the scheduler {printable(calibration.scheduler['class'])}, the pipeline has "
            f"{present['class']}: {AGAIN}"
        )
    for key, value in calibration.scheduler["config"].items():
        if key in present["config"] and present["config"][key] != value:
            raise MismatchError(
                f"the scheduler's {key} is {present['config'][key]!r}, the calibration is for {shown(value)}: {AGAIN}"
            )


def check_guidance(calibration: Calibration, pipe: Any) -> None:
    """Warn about another guidance scale."""
    present, calibrated = getattr(pipe, "guidance_scale", None), calibration.guidance_scale
    if present is not None and calibrated is not None and abs(present - calibrated) > 1e-6:
        warn(f"guidance scale is {present:g}, the calibration is for {calibrated:g}: quality may be lower")


def check_latents(calibration: Calibration, shape: Sequence[int]) -> None:
    """Warn for latents of another shape than calibrated, without the batch; raise MismatchError for other channels."""
    wanted, shape, channels = calibration.latent_shape, list(shape), calibration.combinations().channels
    if shape == wanted:
        return
    if channels is not None:
        count = channels.layout.channels_of(wanted)
        if len(shape) != len(wanted) or channels.layout.channels_of(shape) != count:
            raise MismatchError(
                f"latents are {shape}, the calibration has coefficients for {count} channels of {wanted}: {AGAIN}"
            )
    warn(f"latents are {shape}, the calibration is for {wanted}: quality may be lower")


def check_grid(calibration: Calibration, timesteps: list[float], sigmas: list[float]) -> None:
    """Raise MismatchError if the run's grid is not the calibrated one."""
    wanted = calibration.num_inference_steps
    if len(timesteps) != wanted:
        raise MismatchError(f"the run has {len(timesteps)} steps, the calibration is for {wanted}: {AGAIN}")
    pairs = zip(
        [*timesteps, *(1000 * s for s in sigmas)],
        [*calibration.timesteps, *(1000 * s for s in calibration.sigmas)],
        strict=False,
    )
    for index, (present, calibrated) in enumerate(pairs):
        if abs(present - calibrated) > GRID_TOLERANCE:
            step = index if index < wanted else index - wanted  # the sigmas follow the timesteps
            raise MismatchError(
                f"the noise grid differs at step {step} ({present:g}, calibrated {calibrated:g}); another resolution "
                f"or shift moves it: {AGAIN}"
            )


def warn(message: str) -> None:
    """Issue a MismatchWarning."""
    warnings.warn(message, MismatchWarning, stacklevel=3)
