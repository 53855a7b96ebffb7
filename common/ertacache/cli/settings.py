"""Settings of a model folder: constants of config.py, overrides for the tiny pipeline, and flags.

Precedence: flag, then `tiny/config.py` if the tiny pipeline runs, then `config.py`.
"""

import argparse
import math
import runpy
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from ertacache.cli.command import Parser
from ertacache.errors import UsageError
from ertacache.published import PHI_OVER

GOALS = ("speedup", "computed_steps", "min_psnr", "threshold")
EFFORTS = ("fast", "balanced", "best")
METHODS = ("none", "paper", "teacache", "ertacache", "auto")
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")

Flag = tuple[str, dict[str, Any]]  # its name, and the arguments of add_argument, a default among them


class Settings(argparse.Namespace):
    """One attribute per constant, in lower case, with `folder`, `prompt` and what the command adds."""

    def goal(self) -> tuple[str, Any]:
        """The one goal that is set: ("speedup", 2.0), ("computed_steps", 14), ..."""
        named = [(name, getattr(self, name)) for name in GOALS if getattr(self, name) is not None]
        if len(named) != 1:
            raise UsageError(
                f"set exactly one of {', '.join(GOALS)}; set are {', '.join(n for n, _ in named) or 'none'}"
            )
        return named[0]

    def memory_limit(self) -> int | None:
        """Bytes of recorded trajectories that may stay in memory; None: no limit."""
        limit = getattr(self, "memory_limit_gib", None)
        return None if limit is None else int(limit * 2**30)

    def path(self, name: str) -> Path:
        """Resolve a path: relative to the model folder if from a config file, to the working folder if a flag."""
        path = Path(getattr(self, name))
        return path if name in getattr(self, "given", ()) else self.folder / path


def read_constants(path: Path) -> dict[str, tuple[Any, tuple[type, ...]]]:
    """Name -> (value, allowed types) of the UPPER_CASE constants of a file, by annotation or by value."""
    module = runpy.run_path(str(path))
    annotations = module.get("__annotations__", {})
    return {
        name.lower(): (value, _types(annotations.get(name, type(value))))
        for name, value in module.items()
        if name.isupper()
    }


def _types(annotation: Any) -> tuple[type, ...]:
    kinds = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return tuple(kind for kind in kinds if kind is not type(None))


def _converter(kinds: tuple[type, ...]) -> Any:
    def convert(text: str) -> Any:
        if kinds[0] is bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
            return text.lower() == "true"
        try:
            return kinds[0](text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not of type {kinds[0].__name__}") from None

    return convert


class _Refused(argparse.Action):
    """Refuse a flag of other commands that does nothing in this one; `const` says what does."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        raise UsageError(f"{option_string} has no part in this command: {self.const}")


def parse(
    folder: Path,
    argv: Sequence[str] | None,
    description: str,
    extra: Sequence[Flag] = (),
    refused: Mapping[str, str] = types.MappingProxyType({}),
) -> Settings:
    """Parse the settings of a model folder from its config files and the command line.

    Args:
        extra: further flags of the command, as (name, arguments of add_argument), before constants of the same name.
        refused: flag -> what to use instead, for those that have no effect in this command.

    Raises UsageError: an unknown or refused flag, or a value of the wrong type.
    """
    constants = read_constants(folder / "config.py")
    own = {_attribute(flag): arguments["default"] for flag, arguments in extra}
    flags: dict[str, dict[str, Any]] = {_flag(name): _arguments(*constant) for name, constant in constants.items()}
    flags["--prompt"] = {"action": "append", "metavar": "TEXT", "help": "a prompt; may be given again"}
    flags |= dict(extra)
    flags |= {
        flag: {"action": _Refused, "const": advice, "nargs": "?", "help": argparse.SUPPRESS}
        for flag, advice in refused.items()
    }
    parser = Parser(description=description, allow_abbrev=False)
    for flag, arguments in flags.items():
        parser.add_argument(flag, **{**arguments, "default": argparse.SUPPRESS})  # so that `given` is what was given
    given = vars(parser.parse_args(argv))
    values = {name: value for name, (value, _) in constants.items()}
    settings = Settings(**{**values, "folder": folder, "prompt": None, **own, **given})
    settings.given, settings.of_command = frozenset(given), frozenset(own)
    if {"prompt", "prompts"} <= settings.given:
        raise UsageError("give --prompt or --prompts, not both")
    _take_goal(settings)
    return settings


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _arguments(value: Any, kinds: tuple[type, ...]) -> dict[str, Any]:
    """Arguments of add_argument for a constant."""
    return {"type": _converter(kinds), "metavar": kinds[0].__name__.upper(), "help": f"default: {value}"}


def apply_overrides(settings: Settings, path: Path) -> None:
    """Override constants with those of `path`, except given flags and the command's own."""
    for name, (value, _) in read_constants(path).items():
        if name not in settings.given | settings.of_command:
            setattr(settings, name, value)


def _take_goal(settings: Settings) -> None:
    """Let a flag for one goal clear the configured one."""
    chosen = [name for name in GOALS if name in settings.given]
    if len(chosen) > 1:
        raise UsageError(f"give one of {', '.join(map(_flag, GOALS))}, not {len(chosen)}")
    if chosen:
        for name in GOALS:
            if name not in chosen:
                setattr(settings, name, None)


def check(settings: Settings) -> None:
    """Raise UsageError for impossible values, whatever the model."""
    _one_of(settings, "method", METHODS)
    _one_of(settings, "effort", EFFORTS)
    _one_of(settings, "dtype", DTYPES)
    _one_of(settings, "offload", OFFLOADS)
    if hasattr(settings, "phi_over"):
        _one_of(settings, "phi_over", PHI_OVER)
    for name in ("num_inference_steps", "height", "width", "max_sequence_length", "num_calibration_prompts"):
        if getattr(settings, name, 1) < 1:
            raise UsageError(f"{_flag(name)} must be 1 or more, not {getattr(settings, name)}")
    if not getattr(settings, "fps", 1) > 0:
        raise UsageError(f"--fps must be above 0, not {settings.fps:g}")
    if not 0 <= getattr(settings, "video_quality", 0) <= 10:
        raise UsageError(f"--video-quality must lie between 0 and 10, not {settings.video_quality:g}")
    limit = getattr(settings, "memory_limit_gib", None)
    if limit is not None and not 0 <= limit < math.inf:
        raise UsageError(f"--memory-limit-gib must be 0 or more, not {limit:g}")
    if settings.method == "none":
        return
    name, value = settings.goal()
    steps = settings.num_inference_steps
    if name == "speedup" and not 1 <= value <= steps:
        raise UsageError(f"--speedup must lie between 1 and the number of steps ({steps}), not {value:g}")
    if name == "computed_steps" and not 1 <= value <= steps:
        raise UsageError(f"--computed-steps must lie between 1 and the number of steps ({steps}), not {value}")
    if name == "threshold" and (settings.method in ("ertacache", "auto") or not value > 0):
        raise UsageError("--threshold takes a positive number and belongs to --method paper or teacache")
    if name == "min_psnr" and not (settings.method != "teacache" and 0 < value < 120):
        raise UsageError("--min-psnr takes dB between 0 and 120 and belongs to --method ertacache, auto or paper")
    if settings.method == "auto" and settings.effort == "best":
        raise UsageError("--effort best belongs to --method ertacache: auto fits to the results as you make them")


def check_multiple(settings: Settings, names: Sequence[str], multiple: int) -> None:
    """Raise UsageError for a number that is no multiple: a pipeline would round it in silence."""
    for name in names:
        if getattr(settings, name) % multiple:
            raise UsageError(f"{_flag(name)} must be a multiple of {multiple}, not {getattr(settings, name)}")


def _one_of(settings: Settings, name: str, allowed: Sequence[str]) -> None:
    if getattr(settings, name) not in allowed:
        raise UsageError(f"{_flag(name)} must be one of {', '.join(allowed)}, not {getattr(settings, name)!r}")


def read_prompts(path: Path) -> list[str]:
    """Read the non-empty lines of a prompt file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"prompt file {path} cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
        ) from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UsageError(f"prompt file {path} holds no prompt: write one a line")
    return prompts


def prompts_of(settings: Settings) -> list[str]:
    """The prompts to generate."""
    if settings.prompt:
        empty = [p for p in settings.prompt if not p.strip()]
        if empty:
            raise UsageError("--prompt is empty")
        return settings.prompt
    return read_prompts(settings.path("prompts"))
