"""The work of modules that run at every step, beside the networks that rest on reused ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ertacache.attach import networks_of
from ertacache.intercept import attachment_of


@contextmanager
def counted(pipe: Any) -> Iterator[dict[str, float]]:
    """Parameters times samples of calls of modules that do not rest on reused steps, from a run's second step on."""
    work: dict[str, float] = {}

    def worked(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if attachment_of(pipe) is not None and attachment_of(pipe).after_first_step:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
            work[name] = work.get(name, 0.0) + size_of(module) * (len(tensors[0]) if tensors else 1)

    resting = {id(network) for network in networks_of(pipe).values()}
    others = {
        name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module) and id(part) not in resting
    }
    hooks = [part.register_forward_pre_hook(partial(worked, name), with_kwargs=True) for name, part in others.items()]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def shares(work: dict[str, float], pipe: Any, samples: float) -> dict[str, float]:
    """Of each module in the work of steps in which the transformer sees so many samples."""
    total = size_of(pipe.transformer) * samples + sum(work.values()) or 1.0
    return {name: round(value / total, 4) for name, value in work.items() if value > 1e-3 * total}


def size_of(module: nn.Module) -> int:
    """How many parameters a module has, at least one."""
    return sum(parameter.numel() for parameter in module.parameters()) or 1
