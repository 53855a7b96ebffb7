"""Compare a calibration with a saved pipeline, without building the pipeline or running its code."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ertacache.calibration import Calibration
from ertacache.checks import AGAIN, check_model, check_scheduler, check_weights
from ertacache.errors import MismatchError, MismatchWarning, UsageError
from ertacache.schema import printable


def check_folder(calibration: Calibration, folder: Path) -> list[str]:
    """Return what was compared, one line each; differences that cost quality only begin with "warning".

    Loads the transformer's weights on the CPU, from safetensors files only.

    Raises:
        UsageError: the folder is not a saved pipeline.
        MismatchError: the calibration is for another model or scheduler.
    """
    index = _index(folder)
    lines = [_scheduler_line(calibration, folder, index)]
    dtype = getattr(torch, calibration.dtype, None)
    transformer = _load(folder, index, "transformer", dtype=dtype if isinstance(dtype, torch.dtype) else None)
    if transformer is None:
        _compare_name(index["transformer"], calibration.model["class"], "transformer")
        lines.append("transformer: the same class by name; not a class of diffusers, so nothing else is compared")
        return lines
    check_model(calibration, transformer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_weights(calibration, transformer)
    found = [str(w.message) for w in caught if issubclass(w.category, MismatchWarning)]
    lines.append(f"transformer: {type(transformer).__name__} with the calibrated configuration")
    return (
        [*lines, *(f"warning: {message}" for message in found)] if found else [*lines, "weights: the calibrated ones"]
    )


def _scheduler_line(calibration: Calibration, folder: Path, index: dict[str, list[str]]) -> str:
    """Say what was compared of the scheduler; raises as `check_folder` does."""
    import diffusers

    scheduler, wanted = _load(folder, index, "scheduler"), calibration.scheduler["class"]
    if scheduler is None:
        _compare_name(index["scheduler"], wanted, "scheduler")
        return "scheduler: the same class by name; not a class of diffusers, so its settings are not compared"
    if not hasattr(diffusers, wanted):  # as those of Wan and CogVideoX here, which no saved pipeline names
        return f"scheduler: {printable(wanted)} is put in by the model's folder; its settings are not compared"
    check_scheduler(calibration, scheduler)
    return f"scheduler: {type(scheduler).__name__} with the calibrated settings"


def _index(folder: Path) -> dict[str, list[str]]:
    """Library and class names of transformer and scheduler, from model_index.json."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {name: index[name] for name in ("transformer", "scheduler")}
    except OSError:
        raise UsageError(f"--model {folder} holds no model_index.json: it is not a saved pipeline") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--model {folder}: its model_index.json names no transformer and scheduler") from None
    for name, part in parts.items():
        if not (isinstance(part, list) and len(part) == 2 and all(isinstance(word, str) for word in part)):
            raise UsageError(f"--model {folder}: its model_index.json names no {name}")
    return parts


def _load(folder: Path, index: dict[str, list[str]], name: str, **kwargs: Any) -> Any:
    """Load a part of the pipeline; None for a class that is not diffusers', whose code would have to run."""
    import diffusers

    library, class_name = index[name]
    kind = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        return None
    if name == "transformer":
        kwargs["use_safetensors"] = True  # the other format is pickle
    try:
        return kind.from_pretrained(folder, subfolder=name, local_files_only=True, **kwargs)
    except Exception as error:  # diffusers raises many kinds here; all mean: not loaded
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--model {folder}: its {name} cannot be loaded ({printable(first)})") from error


def _compare_name(part: list[str], wanted: str, name: str) -> None:
    if part[1] != wanted:
        raise MismatchError(
            f"the calibration is for the {name} {printable(wanted)}, the folder has {printable(part[1])}: {AGAIN}"
        )
