"""Apply a calibration to a pipeline or a bare transformer, and remove it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ertacache.attach import Attachment, networks_of
from ertacache.calibration import Bundle, Calibration
from ertacache.checks import check_pipeline
from ertacache.errors import CalibrationError, MismatchError
from ertacache.intercept import attachment_of, check_free, unfollow
from ertacache.replay import BundleReplay, Replay

if TYPE_CHECKING:
    from ertacache.bare import ModelAttachment


class Applied:
    """What `apply` returns: an attached calibration. As a context manager it is removed at the end.

    What it replaced is attached again then, unless that was removed or left in the meantime.

    Attributes:
        pipe: what it is attached to.
        calibration: the one that runs, or the bundle.
    """

    def __init__(self, pipe: Any, calibration: Calibration | Bundle, attachment: "Attachment | ModelAttachment"):
        self.pipe = pipe
        self.calibration = calibration
        self._roll = _called(pipe, calibration)
        try:
            self._attachment = attachment.attach()
        except BaseException:
            self._leave()
            raise
        attachment.handle, self._closed = self, False
        self._replaced: Applied | None = None

    @property
    def computed_calls(self) -> int:
        """Transformer calls that ran since `apply`."""
        return self._attachment.computed_calls

    @property
    def reused_calls(self) -> int:
        """Transformer calls of reused steps, which did not run, since `apply`."""
        return self._attachment.reused_calls

    def __enter__(self) -> "Applied":
        return self

    def _leave(self) -> None:
        if self._roll is not None:
            self._roll.leave()

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._leave()
        if attachment_of(self.pipe) is not self._attachment:
            return  # removed, or replaced by a later one
        self._attachment.detach()
        before = self._replaced
        while before is not None and before._closed:
            before = before._replaced
        if before is not None:
            before._attachment.attach()


def apply(
    pipe: Any,
    calibration: Calibration | Bundle | str | Path,
    *,
    speedup: float | None = None,
    converted: bool = False,
    check_finite: bool = True,
) -> Applied:
    """Attach a calibration, or the file of that name, to a pipeline with a transformer and a scheduler.

    Works at once, until `remove(pipe)` or the end of a `with` block. Replaces a calibration that is attached already.

    Args:
        pipe: the pipeline; or a bare transformer, if the scheduler is out of reach, as in the official packages. Then
            nothing can compare the guidance scale.
        calibration: one, or a bundle, each run of which takes the calibration that is for its noise grid.
        speedup: N / K, where a bundle has several for a grid: the nearest; by default the most computed steps.
        converted: the bare transformer holds the calibrated weights in another package's class: do not compare class,
            configuration and weights.
        check_finite: raise NumericsError at the end of a run that held NaN or Inf, naming the step; reads one number
            per step (and branch, of a bare transformer) from the device, all at the last step.

    Raises:
        CalibrationError: the file is not a valid calibration.
        MismatchError: the calibration is for another model or scheduler; in a run, for another number of steps, noise
            grid or number of channels.
        StateError: the transformer is attached elsewhere, or shared with processes in which it is not attached; in
            a run, its calls cannot be followed: no set_timesteps before it, a start after step 0, a replaced scheduler.
        NumericsError: in a run, see `check_finite`.
    Warns:
        MismatchWarning: other weights or dtype than calibrated; in a run another guidance scale or latent shape, or
            weights that changed since.
    """
    if not isinstance(calibration, (Calibration, Bundle, str, Path)):
        raise CalibrationError(f"apply takes a Calibration or the path of its file, not {type(calibration).__name__}")
    if isinstance(calibration, (str, Path)):
        calibration = Bundle.load(calibration)
    if isinstance(calibration, Bundle) and len(calibration) == 1:
        calibration = calibration[0]
    if isinstance(pipe, nn.Module) and getattr(pipe, "scheduler", None) is None:
        from ertacache.bare import ModelAttachment, check_bare_model  # most pipelines have a scheduler

        if isinstance(calibration, Bundle):
            raise MismatchError("a bundle is for a pipeline: apply one of its calibrations to a transformer alone")
        before = attachment_of(pipe)
        check_bare_model(calibration, pipe, converted)
        if before is not None and not isinstance(before, ModelAttachment):
            check_free(pipe)
        return _replacing(before, pipe, calibration, ModelAttachment(pipe, calibration, check_finite))
    check_parts_of(pipe)
    if converted:
        raise MismatchError("converted=True is for a transformer alone, not for a pipeline")
    before = attachment_of(pipe)
    if isinstance(calibration, Bundle):
        replay: Replay = BundleReplay(calibration, pipe, speedup)
    else:
        check_pipeline(calibration, pipe)
        replay = Replay(calibration, pipe)
    return _replacing(before, pipe, calibration, replay.attachment("end" if check_finite else None))


def _replacing(before: Any, pipe: Any, calibration: Calibration | Bundle, attachment: Any) -> Applied:
    """Attach in place of what is attached, which comes back if this one is refused or its block is left."""
    handle = getattr(before, "handle", None)
    if before is not None:
        before.detach()
        unfollow(pipe)  # of a pipeline that was copied while attached
    try:
        made = Applied(pipe, calibration, attachment)
    except BaseException:
        if handle is not None and not handle._closed:
            before.attach()
        raise
    made._replaced = handle
    return made


def _called(pipe: Any, calibration: Calibration) -> Any:
    """The roll of the processes that share the model, once all of them are attached; None for a process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from ertacache.official.ranks import joined  # one process is the rule

    return joined([pipe] if isinstance(pipe, nn.Module) else networks_of(pipe).values(), calibration.computed_steps)


def check_parts_of(pipe: Any) -> None:
    """Raise MismatchError for a pipeline that has no transformer or no scheduler that can be followed."""
    name = type(pipe).__name__
    for part in ("transformer", "scheduler"):
        if getattr(pipe, part, None) is None:
            unet = " but a UNet" if getattr(pipe, "unet", None) is not None else ""
            raise MismatchError(
                f"{name} has no {part}{unet}: ERTACache attaches to a transformer and a scheduler{_instead(pipe)}"
            )
    if not all(callable(getattr(pipe.scheduler, method, None)) for method in ("set_timesteps", "step")):
        raise MismatchError(
            f"{name}'s scheduler {type(pipe.scheduler).__name__} has no set_timesteps and step, so its loop cannot be "
            f"followed{_instead(pipe)}"
        )


def _instead(pipe: Any) -> str:
    """What to apply to in place of an object of another package: a model that it holds, or what holds one."""
    from ertacache.bare import can_follow

    parts = {"transformer": getattr(pipe, "transformer", None), **getattr(pipe, "__dict__", {})}
    for name, part in parts.items():
        if isinstance(part, nn.Module) and can_follow(part):
            return f". Apply to its .{name}, with converted=True; to calibrate, see docs/official-packages.md"
        if isinstance(getattr(part, "transformer", None), nn.Module):
            return f". Apply to its .{name}.transformer, with converted=True; see docs/official-packages.md"
    return ""


def remove(pipe: Any) -> None:
    """Remove ERTACache from a pipeline or transformer, which is then as before; do nothing if none is attached."""
    attachment = attachment_of(pipe)
    if attachment is None:
        return
    handle = getattr(attachment, "handle", None)
    while handle is not None:  # those that it replaced stay away too
        handle._leave()
        handle._closed, handle = True, handle._replaced
    attachment.detach()
    unfollow(pipe)  # of a pipeline that was copied while attached
