"""Refuse a calibration that does not belong to a pipeline or a run; warn if that costs quality only."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from ertacache import provenance, solver
from ertacache.attach import networks_of
from ertacache.calibration import Calibration
from ertacache.errors import MismatchError, MismatchWarning, StateError
from ertacache.schema import printable, shown

GRID_TOLERANCE = 5e-5  # of a grid's largest timestep, by which a timestep may be off: 0.05 in 0 .. 1000
TIME_SCALES = (1.0, 1e-3, 1e3)  # packages count the same time from 1000 to 0, or from 1 to 0
LOWER = "quality may be lower"
OTHER_CACHES = ("mag_cache", "fbc_", "faster_cache", "taylorseer", "sea_cache", "pyramid_attention")  # diffusers' hooks
CACHED = ("_is_cached", "enable_teacache", "magcache_thresh")  # what other caches set on a network or its class
# arguments that are compared by the grid or the latents that they lead to, or change neither
UNCOMPARED = (
    *("num_inference_steps", "height", "width", "num_frames", "strength", "output_type", "return_dict"),
    *("num_images_per_prompt", "num_videos_per_prompt", "use_resolution_binning"),
)
PER_PROMPT = "one for each prompt"  # of an argument, in the settings
AGAIN = "calibrate again for it (ertacache.calibrate, or run.sh with the new setting)"


def check_pipeline(calibration: Calibration, pipe: Any) -> None:
    """Raise MismatchError for another model or scheduler; warn for other weights, dtype or settings of the pipeline."""
    check_no_other_cache(pipe)
    check_model(calibration, pipe.transformer)
    check_scheduler(calibration, pipe.scheduler)
    check_weights(calibration, pipe.transformer)
    if calibration.pipeline:
        check_parts(calibration, pipe)


def check_no_other_cache(pipe: Any) -> None:
    """Raise StateError where another cache runs in a pipeline or a transformer: each would spoil the other's."""
    for name, network in (networks_of(pipe) or {"transformer": pipe}).items():
        on = getattr(network, "is_cache_enabled", False)
        registries = [getattr(part, "_diffusers_hook", None) for part in network.modules()]
        hooks = [hook for registry in registries for hook in getattr(registry, "hooks", {})]
        found = [hook for hook in hooks if any(kind in hook for kind in OTHER_CACHES)]
        found += [mark for mark in CACHED if getattr(network, mark, False)]
        if found or (on and not any("text_kv_cache" in hook for hook in hooks)):  # which is exact
            raise StateError(
                f"another cache is on in pipe.{name} ({found[0] if found else 'enable_cache'}), and two cannot share a "
                f"run: switch it off (pipe.{name}.disable_cache() for those of diffusers), or do not use ERTACache"
            )


def check_parts(calibration: Calibration, pipe: Any) -> None:
    """Compare the pipeline's class, config and further networks with those of a file that has them."""
    wanted, present = calibration.pipeline or {}, provenance.pipeline_identity(pipe)
    names = dict.fromkeys([*wanted["networks"], *present["networks"]])
    for name in names:
        one, other = wanted["networks"].get(name), present["networks"].get(name)
        if one is None or other is None:
            raise MismatchError(
                f"the {'pipeline' if one is None else 'calibrated pipeline'} has a {printable(name)}, the "
                f"{'calibrated one' if one is None else 'present one'} has none: {AGAIN}"
            )
        for key in ("class", "config_sha256"):
            if one.get(key) and one.get(key) != other[key]:
                raise MismatchError(f"the {printable(name)} has another {key.split('_')[0]} than calibrated: {AGAIN}")
        weights = [identity.get("weights_fingerprint") for identity in (one, other)]
        if all(weights) and weights[0] != weights[1]:
            warn(f"the weights of {printable(name)} differ from the calibrated ones: {LOWER}")
    if wanted["class"] != present["class"]:
        warn(f"the calibration is for a {printable(wanted['class'])}, this is a {present['class']}: {LOWER}")
    for key, value in wanted["config"].items():
        if key in present["config"] and present["config"][key] != value:
            warn(f"the pipeline's {key} is {present['config'][key]!r}, the calibration is for {shown(value)}: {LOWER}")


def check_model(calibration: Calibration, transformer: Any) -> None:
    """Raise MismatchError for a transformer of another class or configuration."""
    present = provenance.class_name(transformer)
    if present != calibration.model["class"]:
        raise MismatchError(
            f"the calibration is for {printable(calibration.model['class'])}, the pipeline has {present}: {AGAIN}; if "
            f"{present} holds the calibrated weights in another package's class, apply to it alone, with converted=True"
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
    """Notice between runs that an adapter is loaded, fused, scaled or switched, or that weights change otherwise."""

    def __init__(self, calibration: Calibration, pipe: Any):
        self.calibration, self.pipe = calibration, pipe
        self.seen = self._state()
        self.fingerprints = self._fingerprints()

    def check(self) -> None:
        """Warn if the weights changed since the last look and are not the calibrated ones."""
        present = self._state()
        if present == self.seen:
            return
        self.seen, before = present, self.fingerprints
        self.fingerprints = self._fingerprints()
        if self.fingerprints != before:
            check_weights(self.calibration, self.pipe.transformer)
            if self.calibration.pipeline:
                check_parts(self.calibration, self.pipe)

    def _state(self) -> list[str | None]:
        known = self.calibration.model.get("weights_fingerprint")
        return [provenance.weights_state(part) for part in networks_of(self.pipe).values()] if known else []

    def _fingerprints(self) -> list[str | None]:
        return [provenance.weights_fingerprint(part) for part in networks_of(self.pipe).values()] if self.seen else []


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


def check_arguments(calibration: Calibration, pipe: Any, arguments: dict[str, tuple[Any, Any]]) -> None:
    """Warn about arguments of the pipeline's call that differ from the calibrated ones.

    Args:
        arguments: value and default of each; see `provenance.arguments_of`.
    """
    known = dict(calibration.settings)
    if not known:  # of a file that was not made by `calibrate`
        arguments = {}
    if calibration.guidance_scale is not None:
        known["guidance_scale"] = calibration.guidance_scale
    if "guidance_scale" not in arguments and (scale := getattr(pipe, "guidance_scale", None)) is not None:
        arguments = {**arguments, "guidance_scale": (scale, scale)}
    for name, (present, default) in arguments.items():
        calibrated = known.get(name, default)
        if name in UNCOMPARED or name.startswith(("prompt", "callback")) or calibrated == PER_PROMPT:
            continue
        if present is None and name not in known and calibration.pipeline is None:
            continue  # older files left None out
        if not alike(present, calibrated):
            what = name.replace("_", " ")
            warn(f"{what} is {shown(present)}, the calibration is for {shown(calibrated)}: {LOWER}")


def alike(one: Any, other: Any) -> bool:
    """Whether two plain arguments are the same; nothing is the same as an empty text."""
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-6
    return (one or None) == (other or None)


def check_branches(calibration: Calibration, step: int, branches: float) -> None:
    """Raise MismatchError for another kind of guidance, which the number of samples of a step tells."""
    wanted = calibration.pipeline.get("branches", []) if calibration.pipeline else []
    if step >= len(wanted) or not wanted[step] or not all(float(b).is_integer() for b in (branches, wanted[step])):
        return
    if branches != wanted[step]:
        raise MismatchError(
            f"guidance is of another kind than calibrated: the transformer sees {branches:g} samples for each result "
            f"at step {step}, the calibration is for {wanted[step]:g} (a negative prompt or a guidance scale that "
            f"turns guidance on or off?): {AGAIN}"
        )


def check_first(calibration: Calibration, first: int, wanted: int) -> None:
    """Raise StateError for a run that starts at another step of its grid."""
    if first != wanted:
        raise StateError(
            f"the run starts at step {first} of the grid, the calibration is for one from step {wanted}; ERTACache "
            "needs a run that visits every step of the grid in order from there: calibrate with the same strength"
        )


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


def check_grid(calibration: Calibration, timesteps: list[float], sigmas: list[float]) -> int:
    """Return where in the run's grid the calibrated steps begin; raise MismatchError if they are not in it.

    They may be its end, of a run that starts in the middle, or its beginning, of one that leaves its last entry out.
    """
    count = calibration.num_inference_steps
    further = len(timesteps) - count
    if further < 0 or (further > 0 and not calibration.pipeline):
        raise MismatchError(f"the run has {len(timesteps)} steps, the calibration is for {count}: {AGAIN}")
    differing = {first: _differs(calibration, timesteps[first:], sigmas[first:]) for first in (0, further)}
    for first, step in differing.items():
        if step is None:
            return first
    if further:
        raise MismatchError(f"the run has {len(timesteps)} steps, the calibration is for {count}: {AGAIN}")
    at, present, calibrated = differing[0] or (0, 0.0, 0.0)
    raise MismatchError(
        f"the noise grid differs at step {at} ({present:g}, calibrated {calibrated:g}); another resolution "
        f"or shift moves it: {AGAIN}"
    )


def _differs(calibration: Calibration, timesteps: list[float], sigmas: list[float]) -> tuple[int, float, float] | None:
    """The first step at which a grid is not the calibrated one, with both values."""
    wanted = calibration.num_inference_steps
    scale = time_scale(timesteps[0], calibration.timesteps[0])
    times = [scale * t for t in calibration.timesteps]
    grids = (timesteps[:wanted], times, max(map(abs, times))), (sigmas, calibration.sigmas, 1.0)
    for present, calibrated, largest in grids:
        for step, (one, other) in enumerate(zip(present, calibrated, strict=False)):
            if abs(one - other) > GRID_TOLERANCE * largest:
                return step, one, other
    return None


def time_scale(first: float, calibrated: float) -> float:
    """The factor by which a run that begins at timestep `first` counts time otherwise than the calibration."""
    if first <= 0 or calibrated <= 0:
        return 1.0
    return min(TIME_SCALES, key=lambda scale: abs(math.log(first / (scale * calibrated))))


def warn(message: str) -> None:
    """Issue a MismatchWarning."""
    warnings.warn(message, MismatchWarning, stacklevel=3)
