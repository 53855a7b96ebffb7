"""Networks called on slices of a batch, which bounds their peak memory."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ertacache.intercept import Interception, uncompiled


def in_micro_batches(interception: Interception, args: tuple, kwargs: dict[str, Any], size: int) -> Any:
    """Call a network on slices of its batch, so that its peak memory stays that of `size` samples.

    Tensors are sliced whose first dimension is the batch of the first argument; position ids are not. What cannot be
    told apart or joined so is found when the first prompt is run alone (`Runs.repeats`).
    """
    module = interception.module
    bound = inspect.signature(type(uncompiled(module)).forward).bind(module, *args, **kwargs)
    names = list(bound.arguments)[1:]
    batch = bound.arguments[names[0]].shape[0] if names and isinstance(bound.arguments[names[0]], Tensor) else 1
    if batch <= size:
        return interception.run(*args, **kwargs)

    def piece(name: str, value: Any, start: int) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(piece(name, item, start) for item in value)
        if isinstance(value, dict):
            return {key: piece(key, item, start) for key, item in value.items()}
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value[start : start + size] if batched and not name.endswith("_ids") else value

    outputs = []
    for start in range(0, batch, size):
        output = interception.run(**{name: piece(name, bound.arguments[name], start) for name in names})
        # the next call may write into the same memory: a CUDA graph replays with the same output tensor
        outputs.append(output if start + size >= batch else _mapped(torch.clone, output))
    return _mapped(lambda *pieces: torch.cat(pieces), *outputs)


def _mapped(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """A network's output made from others of its structure, tensor by tensor."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return function(*outputs)
    if isinstance(first, Mapping):
        made = {name: _mapped(function, *(one[name] for one in outputs)) for name in first}
        return made if type(first) is dict else type(first)(**made)
    if isinstance(first, (list, tuple)):
        return type(first)(_mapped(function, *items) for items in zip(*outputs, strict=True))
    return first
