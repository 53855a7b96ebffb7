"""Attach a calibration to a pipeline, or to a transformer alone, and take it off again."""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from ertacache.attach import Attachment
from ertacache.calibration import Calibration
from ertacache.checks import check_pipeline
from ertacache.errors import MismatchError
from ertacache.intercept import attachment_of, unfollow
from ertacache.replay import Replay

if TYPE_CHECKING:
    from ertacache.bare import ModelAttachment


class Applied:
    """A calibration attached to a pipeline or a transformer by `apply`; leaving it as a context manager removes it.

    Attributes:
        pipe: what it is attached to.
        calibration: the one that runs.
    """

    def __init__(self, pipe: Any, calibration: Calibration, attachment: "Attachment | ModelAttachment"):
        self.pipe = pipe
        self.calibration = calibration
        self._attachment = attachment.attach()

    @property
    def computed_calls(self) -> int:
        """Transformer calls that ran since the calibration was applied."""
        return self._attachment.computed_calls

    @property
    def reused_calls(self) -> int:
        """Transformer calls of reused steps, which did not run, since the calibration was applied."""
        return self._attachment.reused_calls

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        remove(self.pipe)


def apply(
    pipe: Any, calibration: Calibration | str | Path, *, converted: bool = False, check_finite: bool = True
) -> Applied:
    """Attach `calibration` (or the file of that name) to a pipeline that has a transformer and a scheduler.

    Works at once; `remove(pipe)`, or leaving a `with` block, takes it off. A calibration that is already
    attached is replaced.

    Args:
        pipe: the pipeline; or a transformer alone, for a sampling loop whose scheduler is out of reach, as in the
            official packages. Then the guidance scale cannot be compared with the calibrated one.
        converted: for a transformer alone: it holds the calibrated weights in the class of another package, so that
            class, configuration and weights are not compared.
        check_finite: at the end of a run, raise NumericsError naming the step whose output held NaN or Inf; reads
            one number per step (and branch, for a transformer alone) from the device, all of them at the last step.

    Raises:
        CalibrationError: the file is not a valid calibration.
        MismatchError: the calibration is for another model or scheduler. A run raises it too, where its number of
            steps, its noise grid or the channels of its latents are others than calibrated.
        StateError: the transformer is attached already through something else. A run raises it too, where its calls
            cannot be followed: no set_timesteps before it, another start than step 0, a scheduler that was replaced.
        NumericsError: in a run, see `check_finite`.
    Warns:
        MismatchWarning: other weights or dtype than calibrated; in a run another guidance scale or latent shape, or
            weights that changed since.
    """
    calibration = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    if isinstance(pipe, nn.Module) and getattr(pipe, "scheduler", None) is None:
        from ertacache.bare import ModelAttachment, check_bare_model  # most pipelines have a scheduler

        if isinstance(attachment_of(pipe), ModelAttachment):
            remove(pipe)
        check_bare_model(calibration, pipe, converted)
        return Applied(pipe, calibration, ModelAttachment(pipe, calibration, check_finite))
    _check_parts(pipe)
    if converted:
        raise MismatchError("converted=True is for a transformer alone, not for a pipeline")
    remove(pipe)
    check_pipeline(calibration, pipe)
    return Applied(pipe, calibration, Replay(calibration, pipe).attachment("end" if check_finite else None))


def _check_parts(pipe: Any) -> None:
    for part in ("transformer", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise MismatchError(
                f"{type(pipe).__name__} has no {part}: ERTACache attaches to a transformer and a scheduler"
            )


def remove(pipe: Any) -> None:
    """Take ERTACache off a pipeline or transformer, which is then as before; does nothing where none is attached."""
    attachment = attachment_of(pipe)
    if attachment is not None:
        attachment.detach()
        unfollow(pipe)  # of a pipeline that was copied while attached
