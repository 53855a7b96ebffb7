"""The calibration file: what a run needs to reuse steps, and what it was made for."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ertacache.errors import CalibrationError
from ertacache.files import write_atomically

SCHEMA = 1
METHODS = ("ertacache", "paper")
MAX_FILE_BYTES = 16 * 2**20
MAX_STEPS = 10_000
MAX_COEFFICIENTS = 16


@dataclass(frozen=True)
class Calibration:
    """A cache schedule with its coefficients and its provenance; made by `ertacache.calibrate`.

    Attributes:
        method: "ertacache" or "paper".
        num_inference_steps: N, the number of scheduler steps of a run.
        computed_steps: indices of the steps at which the transformer runs, increasing, from 0.
        timesteps, sigmas: the grid that was calibrated on, N and N + 1 values (no sigmas: empty).
        coefficients: for each step the weights of the last computed outputs, newest first (ertacache).
        threshold, step_factors, error_model: the published method's lambda, phi per step, and (K, B) per reused
            step (paper).
        adjusted_sigmas, adjusted_timesteps: its adjusted grid, in the one or the other (N + 1 or N values).
        guidance_scale, latent_shape, dtype: of the calibrated runs; latent_shape without the batch.
        model, scheduler: what identifies them; see identity.py and solver.py.
        prompts: sha256 and count of the calibration prompts and seeds.
        settings: plain arguments that the pipeline was called with.
        predicted: cross-validated quality: psnr and psnr_p10 in dB; None where it could not be measured.
        versions, date: of the software and the day it was made.
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

    @property
    def speedup(self) -> float:
        """N / K, the speed-up where a reused step costs nothing."""
        return self.num_inference_steps / len(self.computed_steps)

    def save(self, path: str | Path) -> Path:
        """Write the JSON file, under a temporary name first."""
        return write_atomically(path, to_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as `from_dict` takes it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read and validate a calibration file.

        Raises:
            CalibrationError: it is missing, unreadable, too large, or a field of it is wrong (and which).
        """
        return cls.from_dict(_read_json(Path(path)), where=str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "calibration") -> "Calibration":
        """Validate plain JSON data; see `load`."""
        if not isinstance(data, dict):
            raise CalibrationError(f"{where}: not a calibration (the file holds no JSON object)")
        if data.get("schema") != SCHEMA:
            raise CalibrationError(
                f"{where}: field 'schema' is {data.get('schema')!r}, this version reads {SCHEMA}; calibrate again"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known - {"schema"})
        if unknown:
            raise CalibrationError(f"{where}: unknown field {unknown[0]!r}")
        try:
            calibration = cls(**{key: value for key, value in data.items() if key != "schema"})
        except TypeError as error:
            missing = str(error).split(":")[-1].strip()
            raise CalibrationError(f"{where}: field {missing} is missing") from None
        _validate(calibration, where)
        return calibration

    def strip(self) -> str:
        """The cache schedule as one character a step: # computed, . reused."""
        computed = set(self.computed_steps)
        return "".join("#" if i in computed else "." for i in range(self.num_inference_steps))

    def effective_lengths(self) -> list[float]:
        """Per step, how far it goes in units of its original length: the sum of its coefficients.

        For our method this is the trajectory-aware timestep adjustment in closed form; for the paper's it is
        phi.
        """
        if self.coefficients is not None:
            return [sum(c) for c in self.coefficients]
        return list(self.step_factors or [1.0] * self.num_inference_steps)

    def summary(self) -> str:
        """A few lines for a person: schedule, speed-up, predicted quality, provenance."""
        computed, total = len(self.computed_steps), self.num_inference_steps
        lengths = self.effective_lengths()
        lines = [
            f"{self.method}: {computed} of {total} steps computed ({self.speedup:.2f}x)",
            f"schedule   {self.strip()}  (# computed, . reused)",
            f"step size  {min(lengths):.2f} to {max(lengths):.2f} of the original (closed-form timestep adjustment)",
            f"model      {self.model.get('id') or '?'} ({self.model['class']}, {self.dtype})",
            f"scheduler  {self.scheduler['class']}, guidance {self.guidance_scale}, latents {self.latent_shape}",
        ]
        if self.predicted:
            lines.insert(
                1,
                f"predicted  {self.predicted['psnr']:.1f} dB PSNR to the uncached result, worst decile "
                f"{self.predicted['psnr_p10']:.1f} dB ({self.prompts.get('count', '?')} calibration prompts, "
                f"{self.predicted['folds']}-fold cross-validation)",
            )
        return "\n".join(lines)


def to_json(data: dict[str, Any]) -> str:
    """JSON with a field a line: readable, and small enough to diff."""
    rows = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CalibrationError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, not a calibration")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{path}: not valid JSON, perhaps truncated ({str(error)[:80]})") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _validate(c: Calibration, where: str) -> None:
    def require(condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise CalibrationError(f"{where}: field {name!r} must be {wanted}")

    require(c.method in METHODS, "method", f"one of {', '.join(METHODS)}")
    require(
        _is_int(c.num_inference_steps) and 1 <= c.num_inference_steps <= MAX_STEPS,
        "num_inference_steps",
        f"a whole number from 1 to {MAX_STEPS}",
    )
    n = c.num_inference_steps
    steps = c.computed_steps
    require(
        _is_list(steps, _is_int)
        and len(steps) > 0
        and steps[0] == 0
        and steps[-1] < n
        and all(a < b for a, b in pairwise(steps)),
        "computed_steps",
        f"increasing step indices from 0 to at most {n - 1}",
    )
    require(_is_list(c.timesteps, _is_number) and len(c.timesteps) == n, "timesteps", f"{n} numbers")
    require(_is_list(c.sigmas, _is_number) and len(c.sigmas) in (0, n + 1), "sigmas", f"{n + 1} numbers or none")
    for name in ("scheduler", "model"):
        value = getattr(c, name)
        require(isinstance(value, dict) and isinstance(value.get("class"), str), name, "an object with a 'class'")
    require(isinstance(c.scheduler.get("config"), dict), "scheduler", "an object with a 'config'")
    require(_is_list(c.latent_shape, _is_int), "latent_shape", "a list of whole numbers")
    require(isinstance(c.dtype, str), "dtype", "a string")
    for name in ("prompts", "settings", "versions"):
        require(isinstance(getattr(c, name), dict), name, "an object")
    require(isinstance(c.date, str), "date", "a string")
    require(c.guidance_scale is None or _is_number(c.guidance_scale), "guidance_scale", "a number or null")
    _validate_method(c, require)
    keys = ("psnr", "psnr_p10", "folds")
    require(
        c.predicted is None or (isinstance(c.predicted, dict) and all(_is_number(c.predicted.get(k)) for k in keys)),
        "predicted",
        f"null or an object with the numbers {', '.join(keys)}",
    )


def _validate_method(c: Calibration, require: Any) -> None:
    n = c.num_inference_steps
    if c.method == "ertacache":
        ok = _is_list(c.coefficients, lambda row: _is_list(row, _is_number)) and len(c.coefficients) == n
        require(ok, "coefficients", f"{n} lists of numbers")
        so_far = 0
        for step, row in enumerate(c.coefficients):
            so_far += step in c.computed_steps
            ok = 1 <= len(row) <= min(so_far, MAX_COEFFICIENTS)
            require(ok, "coefficients", f"1 to {min(so_far, MAX_COEFFICIENTS)} numbers at step {step}")
        return
    require(c.coefficients is None, "coefficients", "null for method paper")
    factors, adjusted, model = c.step_factors, c.adjusted_sigmas, c.error_model
    require(factors is None or (_is_list(factors, _is_number) and len(factors) == n), "step_factors", f"{n} numbers")
    require(
        adjusted is None or (_is_list(adjusted, _is_number) and len(adjusted) == n + 1),
        "adjusted_sigmas",
        f"null or {n + 1} numbers",
    )
    times = c.adjusted_timesteps
    require(
        times is None or (_is_list(times, _is_number) and len(times) == n), "adjusted_timesteps", f"null or {n} numbers"
    )
    pair = lambda row: row is None or (_is_list(row, _is_number) and len(row) == 2)  # noqa: E731
    require(model is None or (_is_list(model, pair) and len(model) == n), "error_model", f"{n} pairs or nulls")
    require(c.threshold is None or _is_number(c.threshold), "threshold", "a number or null")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value) and abs(value) < 1e30


def _is_list(value: Any, check: Any) -> bool:
    return isinstance(value, list) and all(check(item) for item in value)
