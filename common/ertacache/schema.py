"""Read and check calibration files. They may come from anybody, so nothing in one is trusted before it is checked."""

import json
import math
import os
import stat
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from ertacache.channels import CHANNEL_AXES, MAX_CHANNELS, Layout
from ertacache.errors import CalibrationError
from ertacache.published import MIN_FACTOR

if TYPE_CHECKING:
    from ertacache.calibration import Calibration

SCHEMA = 1
METHOD_FIELDS = {
    "ertacache": ("coefficients", "sample_coefficients", "channel_coefficients", "channel_axis", "streams"),
    "paper": ("threshold", "step_factors", "adjusted_sigmas", "adjusted_timesteps", "error_model"),
}
CALIBRATED_METHODS = tuple(METHOD_FIELDS)
MAX_FILE_BYTES = 16 * 2**20  # one of 1000 steps and 16 channels is half of it; JSON of it takes 0.4 GB at the worst
MAX_STEPS = 10_000
MAX_COEFFICIENTS = 16
SHOWN_CHARACTERS = 80  # of what a file holds, in a message


def read_json(path: Path) -> Any:
    """Read a JSON value from a regular file; CalibrationError for anything else, in bounded time and memory."""
    try:
        # not blocking, so that a pipe under that name is seen to be one and not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CalibrationError(f"{path}: not a regular file")
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name, and ours
        if isinstance(error, CalibrationError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise CalibrationError(f"{_end_of(path)}: cannot be read ({reason})") from None
    if len(data) > MAX_FILE_BYTES:
        raise CalibrationError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, not a calibration")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # of bytes, of JSON, of numbers with thousands of digits
        raise CalibrationError(f"{path}: not valid JSON, perhaps truncated ({str(error)[:SHOWN_CHARACTERS]})") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:SHOWN_CHARACTERS]} is out of range")
    return value


def printable(value: object) -> str:
    """Make a text from a file safe for a terminal: short, without control characters."""
    text = str(value)
    shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def _end_of(path: Path) -> str:
    """Make a path safe for a terminal: a long one by its end, which names the file."""
    text = str(path)
    return printable(text) if len(text) <= SHOWN_CHARACTERS else "..." + printable(text[3 - SHOWN_CHARACTERS :])


def shown(value: object) -> str:
    """Show a JSON value in a message: its repr, shortened."""
    return printable(repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__)


def check_schema(data: Any, where: str) -> None:
    """Raise CalibrationError unless `data` is an object of the schema that this version reads; says what to do."""
    if not isinstance(data, dict):
        raise CalibrationError(f"{where}: not a calibration (the file holds no JSON object)")
    found = data.get("schema")
    if is_int(found) and found == SCHEMA:
        return
    newer = is_int(found) and found > SCHEMA
    advice = (
        "it was made by a newer ertacache: install that, or calibrate again"
        if newer
        else "calibrate again: ertacache.calibrate(pipe, prompts, ...), or run.sh once its file is out of the way"
    )
    raise CalibrationError(f"{where}: field 'schema' is {shown(found)}, this version reads {SCHEMA}; {advice}")


def validate(c: "Calibration", where: str) -> None:
    """Raise CalibrationError naming the first field of a calibration that is wrong."""

    def require(condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise CalibrationError(f"{where}: field {name!r} must be {wanted}")

    known = isinstance(c.method, str) and c.method in CALIBRATED_METHODS
    require(known, "method", f"one of {', '.join(CALIBRATED_METHODS)}")
    require(
        is_int(c.num_inference_steps) and 1 <= c.num_inference_steps <= MAX_STEPS,
        "num_inference_steps",
        f"a whole number from 1 to {MAX_STEPS}",
    )
    n = c.num_inference_steps
    steps = c.computed_steps
    require(
        is_list(steps, is_int)
        and len(steps) > 0
        and steps[0] == 0
        and steps[-1] < n
        and all(a < b for a, b in pairwise(steps)),
        "computed_steps",
        f"increasing step indices from 0 to at most {n - 1}",
    )
    require(is_list(c.timesteps, is_number) and len(c.timesteps) == n, "timesteps", f"{n} numbers")
    require(is_list(c.sigmas, is_number) and len(c.sigmas) in (0, n + 1), "sigmas", f"{n + 1} numbers or none")
    require(is_list(c.latent_shape, is_int), "latent_shape", "a list of whole numbers")
    require(c.guidance_scale is None or is_number(c.guidance_scale), "guidance_scale", "a number or null")
    _validate_method(c, require)
    _validate_provenance(c, require)
    _validate_pipeline(c, require)


Require = Callable[[bool, str, str], None]


def _validate_method(c: "Calibration", require: Require) -> None:
    """Check the fields of the file's method, and that those of the other method are null."""
    for method, names in METHOD_FIELDS.items():
        for name in names:
            require(c.method == method or getattr(c, name) is None, name, f"null for method {c.method}")
    if c.method == "ertacache":
        _validate_coefficients(c, require)
        _validate_channels(c, require)
    else:
        _validate_paper(c, require)


def _validate_rows(c: "Calibration", rows: Any, name: str, require: Require) -> None:
    n = c.num_inference_steps
    ok = is_list(rows, lambda row: is_list(row, is_number)) and len(rows) == n
    require(ok, name, f"{n} lists of numbers")
    computed, so_far = set(c.computed_steps), 0
    for step, row in enumerate(rows):
        so_far += step in computed
        longest = min(so_far, MAX_COEFFICIENTS)
        require(1 <= len(row) <= longest, name, f"1 to {longest} numbers at step {step}")


def _validate_coefficients(c: "Calibration", require: Require) -> None:
    n = c.num_inference_steps
    _validate_rows(c, c.coefficients or [], "coefficients", require)
    streams = c.streams or []
    shapes = is_list(streams, lambda s: isinstance(s, dict) and is_list(s.get("latent_shape"), is_int))
    require(shapes, "streams", "null or objects with coefficients and latent_shape")
    for stream in streams:
        _validate_rows(c, stream.get("coefficients"), "streams", require)
    sample = c.sample_coefficients
    ok = sample is None or (is_list(sample, is_number) and len(sample) == n)
    require(ok, "sample_coefficients", f"null or {n} numbers")


def _validate_paper(c: "Calibration", require: Require) -> None:
    n = c.num_inference_steps
    lengths = {"step_factors": n, "adjusted_sigmas": n + 1, "adjusted_timesteps": n}
    for name, length in lengths.items():
        value = getattr(c, name)
        ok = value is None or (is_list(value, is_number) and len(value) == length)
        require(ok, name, f"null or {length} numbers")
    factors, lowest = c.step_factors, MIN_FACTOR
    ok = factors is None or all(lowest <= factor <= 1 for factor in factors)
    require(ok, "step_factors", f"null or numbers from {lowest:g} to 1")
    require(c.adjusted_sigmas is None or bool(c.sigmas), "adjusted_sigmas", "null where 'sigmas' are none")
    model = c.error_model
    pair = lambda row: row is None or (is_list(row, is_number) and len(row) == 2)  # noqa: E731
    require(model is None or (is_list(model, pair) and len(model) == n), "error_model", f"{n} pairs or nulls")
    require(c.threshold is None or is_number(c.threshold), "threshold", "a number or null")


def _validate_channels(c: "Calibration", require: Require) -> None:
    steps, axis, n = c.channel_coefficients, c.channel_axis, c.num_inference_steps
    if steps is None:
        require(axis is None, "channel_axis", "null without channel_coefficients")
        return
    known = isinstance(axis, int) and axis in CHANNEL_AXES and -axis <= len(c.latent_shape)
    require(known, "channel_axis", f"one of {', '.join(map(str, CHANNEL_AXES))}, and an axis of the latents")
    count = Layout(axis or -1).channels_of(c.latent_shape)
    require(1 <= count <= MAX_CHANNELS, "channel_coefficients", f"null unless there are 1 to {MAX_CHANNELS} channels")
    require(isinstance(steps, list) and len(steps) == n, "channel_coefficients", f"{n} lists")
    for step, (matrices, shared) in enumerate(zip(steps, c.coefficients or [], strict=True)):
        sizes = [len(shared), count, count]
        ok = matrices == [] or _has_sizes(matrices, sizes)
        require(ok, "channel_coefficients", f"empty or {' x '.join(map(str, sizes))} numbers at step {step}")


def _has_sizes(value: Any, sizes: list[int]) -> bool:
    """Whether a value is nested lists of numbers with these lengths."""
    if not sizes:
        return is_number(value)
    return isinstance(value, list) and len(value) == sizes[0] and all(_has_sizes(item, sizes[1:]) for item in value)


def _validate_provenance(c: "Calibration", require: Require) -> None:
    for name in ("scheduler", "model"):
        value = getattr(c, name)
        require(isinstance(value, dict) and isinstance(value.get("class"), str), name, "an object with a 'class'")
    require(isinstance(c.scheduler.get("config"), dict), "scheduler", "an object with a 'config'")
    require(all(v is None or isinstance(v, str) for v in c.model.values()), "model", "an object of strings and nulls")
    ok = isinstance(c.dtype, str) and isinstance(getattr(torch, c.dtype, None), torch.dtype)
    require(ok, "dtype", "a dtype of torch, such as bfloat16")
    for name in ("prompts", "settings", "versions"):
        value = getattr(c, name)
        require(
            isinstance(value, dict) and all(not isinstance(v, (dict, list)) for v in value.values()),
            name,
            "an object of plain values",
        )
    require(isinstance(c.date, str), "date", "a string")
    keys = ("psnr", "psnr_p10", "folds")
    require(
        c.predicted is None or (isinstance(c.predicted, dict) and all(is_number(c.predicted.get(k)) for k in keys)),
        "predicted",
        f"null or an object with the numbers {', '.join(keys)}",
    )
    spread = (c.predicted or {}).get("psnr_range", [0, 0])
    require(is_list(spread, is_number) and len(spread) == 2, "predicted", "an object whose psnr_range is two numbers")


def _validate_pipeline(c: "Calibration", require: Require) -> None:
    if c.pipeline is None:
        return
    wanted = "null or an object with class, config, networks, branches, every_step"
    require(isinstance(c.pipeline, dict), "pipeline", wanted)
    parts = {"config": {}, "networks": {}, "every_step": {}, **c.pipeline}
    require(all(isinstance(parts[name], dict) for name in ("config", "networks", "every_step")), "pipeline", wanted)
    plain = (bool, int, float, str, type(None))
    ok = all(isinstance(value, plain) for value in parts["config"].values())
    ok = ok and all(
        isinstance(one, dict) and isinstance(one.get("class"), str) and all(isinstance(v, plain) for v in one.values())
        for one in parts["networks"].values()
    )
    shares = parts["every_step"].values()
    ok = ok and all(is_number(share) and share >= 0 for share in shares) and sum(shares) < 1
    ok = ok and is_list(parts.get("branches", []), is_number) and {"class", "config", "networks"} <= set(c.pipeline)
    require(ok, "pipeline", wanted)


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def is_number(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value) and abs(value) < 1e30


def is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(check(item) for item in value)
