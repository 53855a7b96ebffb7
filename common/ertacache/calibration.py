"""The calibration file: a cache schedule, its coefficients, and what they were made for."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ertacache.cache import Coefficients
from ertacache.channels import ChannelMatrices, Layout, StepMatrices
from ertacache.errors import CalibrationError
from ertacache.files import write_atomically
from ertacache.schema import SCHEMA, check_schema, printable, read_json, shown, validate

__all__ = ["SCHEMA", "Bundle", "Calibration", "to_json"]

LONG_FIELD = 8000  # characters


@dataclass(frozen=True)
class Calibration:
    """A cache schedule with its coefficients and its provenance; made by `ertacache.calibrate`.

    Attributes:
        method: "ertacache" or "paper".
        num_inference_steps: N, the number of scheduler steps of a run.
        computed_steps: indices of the steps at which the transformer runs, increasing, from 0.
        timesteps, sigmas: the grid that was calibrated on, N and N + 1 values (no sigmas: empty).
        coefficients: for each step those of the computed outputs, newest first (ertacache).
        sample_coefficients: for each step that of the latents it starts from (ertacache); None for none.
        channel_coefficients: for each step the matrices of channels, which add to the shared coefficients, (outputs,
            channels from, channels to); empty where the step has none (ertacache); None for none at all.
        channel_axis: of the channels, from the end: -4 or -3, or -1 for packed tokens.
        threshold, step_factors, error_model: the published method's lambda, phi per step, and (K, B) per reused
            step (paper).
        adjusted_sigmas, adjusted_timesteps: its adjusted grid, in the one or the other (N + 1 or N values).
        guidance_scale, latent_shape, dtype: of the calibrated runs; latent_shape without the batch.
        model, scheduler: what identifies them; see provenance.py and solver.py.
        prompts: sha256 and count of the calibration prompts and seeds.
        settings: plain arguments of the pipeline, the goal and the effort.
        predicted: quality on prompts not fitted to: psnr, its psnr_range (nine times of ten, absent in older files) and
            psnr_p10 (worst decile) in dB to the uncached result, and folds of the cross-validation (older files: 1, and
            left_out prompts); None if not predicted.
        versions, date: of the software and the day it was made.
        pipeline: class, plain config and further networks of the calibrated pipeline (provenance.py); `branches`, how
            many samples the transformer saw for each result at each step; `every_step`, the share of a step's work that
            other modules do, by name, which run at every step. None in older files.
        streams: coefficients and latent_shape of further latents that the pipeline steps, such as audio; None for none.
    """

    method: str
    num_inference_steps: int
    computed_steps: list[int]
    timesteps: list[float]
    sigmas: list[float]
    scheduler: dict[str, Any]
    model: dict[str, Any]
    latent_shape: list[int]
    dtype: str
    coefficients: list[list[float]] | None = None
    sample_coefficients: list[float] | None = None
    channel_coefficients: list[StepMatrices] | None = None
    channel_axis: int | None = None
    threshold: float | None = None
    adjusted_sigmas: list[float] | None = None
    adjusted_timesteps: list[float] | None = None
    step_factors: list[float] | None = None
    error_model: list[list[float] | None] | None = None
    guidance_scale: float | None = None
    prompts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    pipeline: dict[str, Any] | None = None
    streams: list[dict[str, Any]] | None = None

    def combinations(self) -> Coefficients:
        """What every step combines (method ertacache)."""
        outputs = self.coefficients or []
        channels = None
        streams = tuple(Coefficients.of_outputs(stream["coefficients"]) for stream in self.streams or ())
        if self.channel_coefficients is not None and self.channel_axis is not None:
            channels = ChannelMatrices(Layout(self.channel_axis), self.channel_coefficients)
        return Coefficients(outputs, self.sample_coefficients or [0.0] * len(outputs), channels, streams)

    @property
    def speedup(self) -> float:
        """N / K where a reused step costs nothing, and less where other modules run at every step."""
        other = sum((self.pipeline or {}).get("every_step", {}).values())
        return 1 / (other + (1 - other) * len(self.computed_steps) / self.num_inference_steps)

    def save(self, path: str | Path) -> Path:
        """Write the JSON file atomically and return its path.

        Raises OSError: it cannot be written; the old file stays.
        """
        return write_atomically(path, to_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as `from_dict` takes it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read and validate a calibration file.

        Raises CalibrationError: it is missing, unreadable, too large, or a field is wrong; the message names it.
        """
        return cls.from_dict(read_json(Path(path)), where=str(path))

    def push_to_hub(self, repo_id: str, filename: str, **options: Any) -> str:
        """Upload the file to a repository of the hub, and return the address of the commit; see `hub.push`."""
        from ertacache import hub

        return hub.push(self, repo_id, filename, **options)

    @classmethod
    def from_hub(cls, repo_id: str, filename: str, **options: Any) -> "Calibration":
        """Download and validate a file of a repository of the hub; options as for `hub.fetch`."""
        from ertacache import hub

        return cls.load(hub.fetch(repo_id, filename, **options))

    @classmethod
    def from_dict(cls, data: Any, where: str = "calibration") -> "Calibration":
        """Validate plain JSON data; see `load`."""
        check_schema(data, where)
        if "bundle" in data:
            raise CalibrationError(f"{where}: a bundle of several calibrations: give it to apply, or to Bundle.load")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known - {"schema"})
        if unknown:
            raise CalibrationError(f"{where}: unknown field {shown(unknown[0])}")
        try:
            calibration = cls(**{key: value for key, value in data.items() if key != "schema"})
        except TypeError as error:
            missing = str(error).split(":")[-1].strip()
            raise CalibrationError(f"{where}: field {missing} is missing") from None
        validate(calibration, where)
        return calibration

    def strip(self) -> str:
        """The cache schedule, one character per step: # computed, . reused."""
        computed = set(self.computed_steps)
        return "".join("#" if i in computed else "." for i in range(self.num_inference_steps))

    def effective_lengths(self) -> list[float] | None:
        """Length of each step in units of the original: the sum of its coefficients, or phi of the published method.

        This is the trajectory-aware timestep adjustment in closed form. None if the latents or channels take part:
        then no single number is the length of a step.
        """
        if self.sample_coefficients is not None or self.channel_coefficients is not None:
            return None
        if self.coefficients is not None:
            return [sum(c) for c in self.coefficients]
        return list(self.step_factors or [1.0] * self.num_inference_steps)

    def quality(self) -> str:
        """Say the predicted quality in one line, with the range that its mean has nine times of ten."""
        assert self.predicted
        low, high = self.predicted.get("psnr_range") or (None, None)
        spread = "" if low is None else f" ({low:.1f} to {high:.1f})"
        return (
            f"{self.predicted['psnr']:.1f} dB PSNR to the uncached result{spread}, worst decile "
            f"{self.predicted['psnr_p10']:.1f} dB"
        )

    def summary(self) -> str:
        """Summarise for a person: schedule, speed-up, predicted quality, provenance."""
        computed, total = len(self.computed_steps), self.num_inference_steps
        name, kind, dtype = (printable(v) for v in (self.model.get("id") or "?", self.model["class"], self.dtype))
        scheduler, shape = printable(self.scheduler["class"]), printable(self.latent_shape)
        lengths, size = self.effective_lengths(), []
        if lengths is not None:
            size = [f"step size  {min(lengths):.2f} to {max(lengths):.2f} of the original (closed-form adjustment)"]
        lines = [
            f"{self.method}: {computed} of {total} steps computed ({self.speedup:.2f}x)",
            f"schedule   {self.strip()}  (# computed, . reused)",
            *size,
            f"model      {name} ({kind}, {dtype})",
            f"scheduler  {scheduler}, guidance {self.guidance_scale}, latents {shape}",
        ]
        for part, share in (self.pipeline or {}).get("every_step", {}).items():
            lines.append(f"every step {printable(part)} runs at all steps: {share:.0%} of the work, in the speed-up")
        if self.predicted:
            count, left_out = printable(self.prompts.get("count", "?")), self.predicted.get("left_out")
            how = f"{self.predicted['folds']}-fold cross-validation"
            if left_out is not None:
                how = f"on {printable(left_out)} of them that were left out"
            lines.insert(1, f"predicted  {self.quality()} ({count} calibration prompts, {how})")
        return "\n".join(lines)


class Bundle(tuple[Calibration, ...]):
    """Several calibrations of one pipeline in one file: for other numbers of steps, sizes, speed-ups."""

    def save(self, path: str | Path) -> Path:
        """Write the JSON file atomically and return its path. Raises OSError: it cannot be written."""
        return write_atomically(path, to_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"schema": SCHEMA, "bundle": [calibration.to_dict() for calibration in self]}

    def summary(self) -> str:
        """Summarise each for a person."""
        return "\n\n".join(calibration.summary() for calibration in self)

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Read and validate the file of a bundle, or of one calibration; raises CalibrationError as that does."""
        data = read_json(Path(path))
        check_schema(data, str(path))
        if "bundle" not in data:
            return cls([Calibration.from_dict(data, str(path))])
        if not isinstance(data["bundle"], list) or not data["bundle"]:
            raise CalibrationError(f"{path}: field 'bundle' must be a list of calibrations")
        return cls(Calibration.from_dict(one, f"{path}, entry {i}") for i, one in enumerate(data["bundle"]))


def calibration_fields(coefficients: Coefficients) -> dict[str, Any]:
    """The fields of a calibration that hold the coefficients; `Calibration.combinations` is the opposite."""
    latents, channels = coefficients.latents, coefficients.channels
    return {
        "coefficients": coefficients.outputs,
        "sample_coefficients": latents if any(latents) else None,
        "channel_coefficients": channels.steps if channels else None,
        "channel_axis": channels.layout.axis if channels else None,
        "streams": [{"coefficients": stream.outputs} for stream in coefficients.streams] or None,
    }


def to_json(data: dict[str, Any]) -> str:
    """JSON with one field per line, and one line per item of a long list: readable, and small enough to diff."""
    rows = [f" {json.dumps(key)}: {_field_json(value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _field_json(value: Any) -> str:
    text = json.dumps(value, allow_nan=False)
    if len(text) <= LONG_FIELD or not isinstance(value, list):
        return text
    return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"


def computed_steps_for(num_steps: int, speedup: float) -> int:
    """K = floor(N / speedup), at least 1. Raises CalibrationError for a speed-up below 1."""
    if not speedup >= 1:
        raise CalibrationError(f"speedup is {speedup}: it must be 1 or more")
    return max(1, int(num_steps / speedup + 1e-9))


def check_computed_steps(num_steps: int, computed_steps: int) -> None:
    """Raise CalibrationError unless 1 <= K <= N."""
    if not 1 <= computed_steps <= num_steps:
        raise CalibrationError(f"computed_steps is {computed_steps}: it must lie between 1 and {num_steps}")
