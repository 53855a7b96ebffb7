"""Gradients through whole runs of a pipeline: what has to be arranged for them, and undone afterwards."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ertacache.errors import CalibrationError, ERTACacheError

NO_GRADIENT = (
    "descent needs gradients through the transformer, and this one lets none through (it runs without gradients or in "
    "inference mode, or has kernels without a backward, as of quantised weights): calibrate with descent=0"
)


@contextmanager
def differentiable(pipe: Any) -> Iterator[None]:
    """Runs inside the block carry gradients, but none for the parameters; afterwards the pipeline is as it was.

    Raises:
        CalibrationError: the weights were made in inference mode, which no gradient can pass.
    """
    modules = [value for value in vars(pipe).values() if isinstance(value, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if any(parameter.is_inference() for parameter in parameters):
        raise CalibrationError(NO_GRADIENT)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        _forget_graph(pipe.scheduler)


def _forget_graph(scheduler: Any) -> None:
    """Multistep solvers keep outputs, which would hold the whole run and could not be copied."""
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, list):
            vars(scheduler)[name] = [v.detach() if isinstance(v, Tensor) else v for v in value]
        elif isinstance(value, Tensor):
            vars(scheduler)[name] = value.detach()


def undecorated(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call without the decorators that switch gradients off."""
    return functools.partial(inspect.unwrap(type(pipe).__call__), pipe)


def checkpointed(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, made again on the way back: it keeps its arguments only, so memory stays that of one call."""
    return functools.partial(checkpoint, call, use_reentrant=False)


def check_passes(output: Tensor, needed: bool) -> None:
    """Raise CalibrationError for a model output through which no gradient comes back.

    Args:
        needed: the latents that the model was called on carry one.
    """
    if output.is_inference() or (needed and not output.requires_grad):
        raise CalibrationError(NO_GRADIENT)


def go_back(loss: Tensor) -> None:
    """Add the gradients of a loss to its variables; raises CalibrationError where a kernel has none."""
    try:
        loss.backward()
    except (torch.OutOfMemoryError, ERTACacheError):
        raise
    except RuntimeError as error:
        raise CalibrationError(f"{NO_GRADIENT} ({str(error).splitlines()[0]})") from error
