"""Attach a calibration to a pipeline and take it off again."""

from pathlib import Path
from types import TracebackType
from typing import Any

from ertacache.attach import Attachment
from ertacache.calibration import Calibration
from ertacache.errors import MismatchError
from ertacache.replay import Replay, check_pipeline


class Applied:
    """A calibration attached to a pipeline; a context manager whose end removes it."""

    def __init__(self, pipe: Any, calibration: Calibration):
        self.pipe = pipe
        self.calibration = calibration
        self._attachment = Attachment(pipe, Replay(calibration, pipe)).attach()

    @property
    def computed_calls(self) -> int:
        """Transformer calls that ran since the calibration was applied."""
        return self._attachment.computed_calls

    @property
    def reused_calls(self) -> int:
        """Transformer calls that were saved since the calibration was applied."""
        return self._attachment.reused_calls

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        remove(self.pipe)


def apply(pipe: Any, calibration: Calibration | str | Path) -> Applied:
    """Attach `calibration` (or the file of that name) to a pipeline that has a transformer and a scheduler.

    Works at once; `remove(pipe)`, or leaving a `with` block, takes it off. A calibration that is already
    attached is replaced.

    Raises:
        CalibrationError: the file is not a valid calibration.
        MismatchError: the calibration is for another model or scheduler.
    Warns:
        MismatchWarning: other weights or dtype than calibrated.
    """
    for part in ("transformer", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise MismatchError(
                f"{type(pipe).__name__} has no {part}: ERTACache attaches to a transformer and a scheduler"
            )
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    remove(pipe)
    check_pipeline(calibration, pipe)
    return Applied(pipe, calibration)


def remove(pipe: Any) -> None:
    """Take ERTACache off a pipeline, which is then as before; does nothing where none is attached."""
    attachment = pipe.__dict__.get("_ertacache")
    if attachment is not None:
        attachment.detach()
