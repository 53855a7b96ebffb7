"""Calls a transformer on slices of its batch, so that many prompts together need the memory of a few."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ertacache.patching import uncompiled
from ertacache.solver import first_output


def call_in_micro_batches(call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], size: int | None) -> Any:
    """Call a transformer on slices of its batch, so that its peak memory stays that of `size` samples.

    Tensors are sliced whose first dimension is the batch of the first argument; position ids are not.
    """
    if size is None:
        return call(*args, **kwargs)
    bound = inspect.signature(type(uncompiled(module)).forward).bind(module, *args, **kwargs)
    names = list(bound.arguments)[1:]
    batch = bound.arguments[names[0]].shape[0] if names and isinstance(bound.arguments[names[0]], Tensor) else 1
    if batch <= size:
        return call(*args, **kwargs)

    def piece(name: str, value: Any, start: int) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value[start : start + size] if batched and not name.endswith("_ids") else value

    parts = []
    for start in range(0, batch, size):
        output = call(**{name: piece(name, bound.arguments[name], start) for name in names})
        last = start + size >= batch
        # the next call may write into the same memory: a CUDA graph replays with the same output tensor
        parts.append(first_output(output) if last else first_output(output).clone())
    joined = torch.cat(parts)
    return (joined,) if isinstance(output, tuple) else type(output)(joined)
