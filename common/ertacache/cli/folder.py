"""What a model folder contributes to the shared commands, and how its files are named."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ertacache.cli.settings import Settings

SLUG_LENGTH = 48


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder contributes: its pipeline, its arguments, its file format.

    Attributes:
        arguments: settings -> keyword arguments of the pipeline (without prompt and generator).
        save: writes decoded pixels, float (3, H, W) or (F, 3, H, W) in [0, 1], to a path without extension and
            returns the path written.
        teacache_signal: the tensor that TeaCache watches; see the folder's transformer.py.
        variant: settings -> what else moves the noise grid (solver, shift, ...), for a calibration's file name.
    """

    name: str
    arguments: Callable[[Settings], dict[str, Any]]
    save: Callable[[Tensor, Path, Settings], Path]
    teacache_signal: Callable[..., Tensor] | None = None
    variant: Callable[[Settings], str] | None = None


def slug(text: str) -> str:
    """Turn a text into part of a file name: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "untitled"
