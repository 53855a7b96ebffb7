"""One row of results.json: what was run, what it cost, how near it came to the uncached output.

results.json is a plain list of rows; title, command and date lie beside it in results.meta.json.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from compare.pages import ResultsError
from ertacache.files import write_atomically
from ertacache.fit.cost import BEST_RUNS

ROLES = ("reference", "ours", "rival")
# A rival is compared when its cost lies in [ours, ours + COMPARABLE_BAND], as a fraction of transformer FLOPs.
COMPARABLE_BAND = 0.05
LATER = ("form", "calibration_runs")  # fields that files of before lack


@dataclass(frozen=True)
class Metric:
    """How to show a metric; `unit` is empty for a plain number."""

    label: str
    unit: str
    higher_is_better: bool
    decimals: int

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"

    def show(self, value: float, sign: bool = False) -> str:
        """Format a value with the metric's decimals, without unit; what would round to zero is `<0.0001`."""
        least = 10.0**-self.decimals
        if 0 < value < least / 2 and not sign:
            return f"<{least:.{self.decimals}f}"
        return f"{value:{'+' if sign else ''}.{self.decimals}f}".replace("-", "\N{MINUS SIGN}")


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", "dB", True, 2),
    "ssim": Metric("SSIM", "", True, 4),
    "lpips": Metric("LPIPS", "", False, 4),
}
TEMPORAL_ERROR = Metric("Temporal error", "", False, 4)


@dataclass(frozen=True)
class Row:
    """One method at one setting, measured against the uncached output of the same prompts and seeds.

    compute_fraction: transformer FLOPs divided by those of the uncached run; denoise_seconds: per prompt; speedup:
    uncached seconds / seconds; psnr in dB; *_p10: the worst decile; n: number of pictures or videos.
    A metric that was not measured is None and `reasons` says why. `asked_steps` is the asked number of computed
    steps that the row belongs to (None: the reference). `knob` is what was tuned and its value. `form`: what the
    method is, in a line for the notes of tables. `calibration_runs`: what calibrating it cost in uncached runs; None if
    unknown.
    Raises ValueError, naming the field, when a value is not what the contract says.
    """

    model: str
    method: str
    role: str
    setting: str
    num_inference_steps: int
    computed_steps: list[int] | None
    compute_fraction: float
    denoise_seconds: float
    speedup: float
    psnr: float | None
    psnr_p10: float | None
    ssim: float | None
    ssim_p10: float | None
    lpips: float | None
    lpips_p10: float | None
    n: int
    prompts_sha256: str
    seeds: list[int]
    device: str
    dtype: str
    versions: dict[str, str]
    temporal_error: float | None = None
    asked_steps: int | None = None
    knob: dict[str, Any] | None = None
    comparable: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    form: str = ""
    calibration_runs: float | None = None

    @property
    def compared(self) -> bool:
        """Whether it is a rival at a comparable cost, calibrated with no more uncached runs than our best effort."""
        return self.role == "rival" and self.comparable and (self.calibration_runs or 0) <= BEST_RUNS

    def __post_init__(self) -> None:
        for name, (expected, holds) in _CHECKS.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r:.80}")
        if self.computed_steps is not None:
            _check_steps(self.computed_steps, self.num_inference_steps)
        if self.role != "reference" and self.asked_steps is None:
            raise ValueError(f"asked_steps: expected a number for role {self.role}, got None")
        for name in METRICS:
            if getattr(self, name) is None and name not in self.reasons:
                raise ValueError(f"reasons: {name} is null and no reason is given")


@dataclass(frozen=True)
class Curve:
    """Error per step of one method: `error[i]` is the distance of the latents after step i from the reference's.

    error: RMS of the difference, in units of the latents, one number a step; computed_steps: indices of the steps
    where the transformer ran, None where that differs from prompt to prompt; asked_steps: as in `Row`.
    """

    error: Sequence[float]
    computed_steps: Sequence[int] | None = None
    asked_steps: int | None = None


def is_comparable(cost: float, our_cost: float) -> bool:
    """Whether a rival's cost lies in [ours, ours + 0.05], but for rounding of the counted FLOPs."""
    return -1e-6 <= cost - our_cost <= COMPARABLE_BAND + 1e-6


def best_rival(rows: Sequence[Row], name: str) -> Row | None:
    """The compared rival with the best `name` (a row field: psnr, lpips_p10, ...); None if there is none."""
    rivals = [r for r in rows if r.compared and getattr(r, name) is not None]
    higher = METRICS[name.removesuffix("_p10")].higher_is_better
    return (max if higher else min)(rivals, key=lambda r: getattr(r, name), default=None)


def metric_text(row: Row | None, name: str) -> str:
    """Format a metric of a row; "not measured" if it, or the row, is not there."""
    value = getattr(row, name, None)
    return "not measured" if value is None else METRICS[name].show(value)


def write_results(path: str | Path, rows: Sequence[Row], meta: Mapping[str, Any] | None = None) -> None:
    """Write the rows as JSON, and `meta` beside them as <stem>.meta.json, atomically."""
    path = Path(path)
    _write_json(path, [asdict(row) for row in rows])
    if meta is not None:
        _write_json(path.with_suffix(".meta.json"), dict(meta))


def read_results(path: str | Path) -> tuple[list[Row], dict[str, Any]]:
    """Read the rows of a results file and its meta (empty if there is none).

    Raises ResultsError of one line that names the file, the row and the field; OSError when the file cannot be read.
    """
    path = Path(path)
    values = _read_json(path)
    if not isinstance(values, list):
        raise ResultsError(f"{path}: expected a list of rows, got {type(values).__name__}")
    rows = [_row(value, f"{path}: row {index}") for index, value in enumerate(values)]
    meta_path = path.with_suffix(".meta.json")
    meta = _read_json(meta_path) if meta_path.exists() else {}
    if not isinstance(meta, dict):
        raise ResultsError(f"{meta_path}: expected an object, got {type(meta).__name__}")
    return rows, meta


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ResultsError(f"{where}: expected an object, got {type(value).__name__}")
    known = [f.name for f in fields(Row)]
    # every field is written, so one that is absent means a truncated or foreign file, even where Row has a default
    for problem, names in (
        ("missing", [n for n in known if n not in value and n not in LATER]),
        ("unknown", [n for n in value if n not in known]),
    ):
        if names:
            raise ResultsError(f"{where}: {names[0]}: {problem} field")
    try:
        return Row(**value)
    except ValueError as error:
        raise ResultsError(f"{where}: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON: {error}") from None


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _check_steps(steps: list[int], num_steps: int) -> None:
    if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= num_steps:
        raise ValueError(f"computed_steps: expected rising indices in [0, {num_steps}), got {steps!r:.80}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _optional(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for pair in value.items() for v in pair)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(v) for v in value)


_TEXT = ("a non-empty text", lambda v: isinstance(v, str) and bool(v))
_POSITIVE = ("a number above 0", lambda v: _is_number(v) and v > 0)
_COUNT = ("a whole number above 0", lambda v: _is_int(v) and v > 0)
_METRIC = ("a finite number or null", _optional(_is_number))
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("model", "method", "prompts_sha256", "device", "dtype"), _TEXT),
    **dict.fromkeys(("setting", "form"), ("a text", lambda v: isinstance(v, str))),
    "role": ("one of " + ", ".join(ROLES), lambda v: v in ROLES),
    **dict.fromkeys(("num_inference_steps", "n"), _COUNT),
    "asked_steps": (_COUNT[0] + " or null", _optional(_COUNT[1])),
    "computed_steps": ("a list of step indices or null", _optional(_is_ints)),
    **dict.fromkeys(("compute_fraction", "denoise_seconds", "speedup"), _POSITIVE),
    **dict.fromkeys((m + suffix for m in METRICS for suffix in ("", "_p10")), _METRIC),
    **dict.fromkeys(("temporal_error", "calibration_runs"), _METRIC),
    "seeds": ("a non-empty list of whole numbers", lambda v: _is_ints(v) and bool(v)),
    "versions": ("an object of texts", _is_texts),
    "reasons": ("an object of texts", _is_texts),
    "knob": ("an object {name: value} or null", _optional(lambda v: isinstance(v, dict) and bool(v))),
    "comparable": ("true or false", lambda v: isinstance(v, bool)),
}
