"""Generates with a finished calibration, and refuses or warns where it does not belong to the run."""

import warnings
from typing import Any

import torch
from torch import Tensor

from ertacache import provenance, solver
from ertacache.calibration import Calibration
from ertacache.error_model import rectify
from ertacache.errors import MismatchError, MismatchWarning
from ertacache.history import OutputHistory
from ertacache.rectification import combine
from ertacache.schema import printable, shown
from ertacache.solver import StepCall
from ertacache.timesteps import timesteps_on

GRID_TOLERANCE = 0.05  # in timesteps of 0 .. 1000
AGAIN = "calibrate again for it (ertacache.calibrate, or run.sh with the new setting)"


class Replay:
    """Controller of generation: the schedule is known, so no step reads a tensor's values."""

    def __init__(self, calibration: Calibration, pipe: Any):
        self.calibration = calibration
        self.pipe = pipe
        self.computed = frozenset(calibration.computed_steps)
        self.coefficients = calibration.combinations()  # none: the published method
        self.history = OutputHistory(self.coefficients.longest)
        self.residual: Tensor | None = None
        self.weights = self._weights()

    def begin(self, scheduler: Any) -> None:
        self.begin_weights()
        check_grid(self.calibration, *solver.host_grid(scheduler))
        guidance, calibrated = getattr(self.pipe, "guidance_scale", None), self.calibration.guidance_scale
        if guidance is not None and calibrated is not None and abs(guidance - calibrated) > 1e-6:
            _warn(f"guidance scale is {guidance:g}, the calibration is for {calibrated:g}: quality may be lower")
        if self.calibration.adjusted_sigmas is not None:
            set_grid(scheduler, self.calibration.adjusted_sigmas, self.calibration)
        elif self.calibration.adjusted_timesteps is not None:
            solver.put_on_timesteps(scheduler, self.calibration.adjusted_timesteps)
        self.coefficients.prepare(torch.as_tensor(scheduler.timesteps).device)  # where the latents will be too

    def begin_weights(self) -> None:
        """Warn where a LoRA was loaded or fused, or the weights changed otherwise, since the last run."""
        present = self._weights()
        if present != self.weights:
            self.weights = present
            check_weights(self.calibration, self.pipe.transformer)

    def _weights(self) -> str | None:
        known = self.calibration.model.get("weights_fingerprint")
        return provenance.weights_fingerprint(self.pipe.transformer) if known else None

    def should_compute(self, step: int) -> bool:
        return step in self.computed

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        if step == 0:
            check_latents(self.calibration, list(call.sample.shape[1:]))
        if self.calibration.method == "paper":
            return self._paper_output(step, call)
        if step in self.computed:
            self.history.add(call.model_output)
        else:
            self.history.before_reuse()
        return combine(self.history, *self.coefficients.at(step, call.sample))

    def _paper_output(self, step: int, call: StepCall) -> Tensor:
        if step in self.computed:
            self.residual = call.model_output.float() - call.sample.float()
            return call.model_output
        assert self.residual is not None  # step 0 is computed
        reused = call.sample.float() + self.residual
        pair = self.calibration.error_model[step] if self.calibration.error_model else None
        if pair is not None:
            reused = rectify(reused, *pair)
        return reused.to(call.model_output.dtype)

    def after_step(self, step: int, sample: Tensor) -> None:
        if step + 1 in self.computed:
            self.history.before_computing()

    def end(self) -> None:
        self.history.clear()
        self.residual = None


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
        _warn(
            f"the transformer runs in {dtype}, the calibration was made in {printable(calibration.dtype)}: "
            "quality may be lower"
        )
        return
    fingerprint = provenance.weights_fingerprint(transformer)
    wanted = calibration.model.get("weights_fingerprint")
    if wanted and fingerprint and fingerprint != wanted:
        _warn(
            "the weights differ from the calibrated ones (LoRA, quantised, fine-tuned?): quality may be lower; "
            "calibrate again to restore it"
        )


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


def check_latents(calibration: Calibration, shape: list[int]) -> None:
    """Warn for latents of another shape than calibrated, without the batch; raise MismatchError for other channels."""
    wanted, matrices = calibration.latent_shape, calibration.combinations().matrices
    if shape == wanted:
        return
    if matrices is not None:
        channels = matrices.layout.channels_of(wanted)
        if len(shape) != len(wanted) or matrices.layout.channels_of(shape) != channels:
            raise MismatchError(
                f"latents are {shape}, the calibration has coefficients for {channels} channels of {wanted}: {AGAIN}"
            )
    _warn(f"latents are {shape}, the calibration is for {wanted}: quality may be lower")


def check_grid(calibration: Calibration, timesteps: list[float], sigmas: list[float]) -> None:
    """Raise MismatchError where the run's grid is not the calibrated one."""
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


def set_grid(scheduler: Any, sigmas: list[float], calibration: Calibration) -> None:
    """Put an adjusted grid into a scheduler whose grid is set."""
    old_sigmas, old_timesteps = scheduler.sigmas, scheduler.timesteps
    times = timesteps_on(sigmas, calibration.sigmas, calibration.timesteps)
    scheduler.sigmas = torch.tensor(sigmas, dtype=old_sigmas.dtype, device=old_sigmas.device)
    scheduler.timesteps = torch.tensor(times, dtype=old_timesteps.dtype, device=old_timesteps.device)


def _warn(message: str) -> None:
    warnings.warn(message, MismatchWarning, stacklevel=2)
