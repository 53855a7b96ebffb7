"""Puts ERTACache in front of one object's own calls, by a class that goes before the object's own.

The class is set on the instance and taken off again; nothing lives on it. Hooks of offloading, LoRA layers and
`module.compile()` all work inside `nn.Module.__call__` and so stay where they are, in whatever order they come.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame

from ertacache.errors import StateError

ADDED = "_ertacache_added"  # marks a class that was made here, which may be taken off


class CachedTransformer:
    """Mixin for a transformer class: its call runs the model on computed steps and not on reused ones.

    On a reused step it returns an expanded zero of the model output's shape and dtype: no memory, no work.
    The scheduler's step knows that the step is reused and takes the rectified output instead.
    """

    # not traced: what changes from step to step in here would recompile the model at every step
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attachment = self.__dict__.get("_ertacache")
        if attachment is None:
            return own_call(self)(*args, **kwargs)
        if _inside_compiled_wrapper() and uncompiled(self) is self:
            raise StateError(
                "the transformer was wrapped by torch.compile after ertacache.apply and is called through the wrapper: "
                "apply again (compile first, then apply), or use transformer.compile(), which works in any order"
            )
        return attachment.call(own_call(self), self, args, kwargs)


@torch.compiler.disable
def own_call(instance: Any) -> Callable[..., Any]:
    """The call of an object without the mixin; also where the mixin has been taken off in the meantime."""
    kind = next(k for k in type(instance).__mro__ if k is not CachedTransformer and "__call__" in vars(k))
    return MethodType(vars(kind)["__call__"], instance)


def _inside_compiled_wrapper() -> bool:
    inside = getattr(eval_frame, "_is_in_optimized_module", None)  # private, so it may go away
    return inside is not None and inside()


def uncompiled(module: Any) -> Any:
    """The module inside the wrapper that `torch.compile(module)` returns; any other module as it is."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)


@functools.cache
def cached_class(transformer_class: type) -> type:
    """`transformer_class` with `CachedTransformer` in front; it holds no state and keeps the name."""
    return _named_alike(transformer_class, (CachedTransformer, transformer_class), {})


@functools.cache
def followed_class(pipeline_class: type) -> type:
    """`pipeline_class` whose call ends the run that it began, however it ends: returned, raised or interrupted."""
    original = pipeline_class.__call__

    @functools.wraps(original)  # pipelines' calls are inspected for their arguments
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            attachment = self.__dict__.get("_ertacache")
            if attachment is not None:
                attachment.finish()

    return _named_alike(pipeline_class, (pipeline_class,), {"__call__": __call__})


def _named_alike(original: type, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, ADDED: original}
    return type(original.__name__, bases, {**names, **namespace})


def put_in_front(transformer: nn.Module, attachment: Any) -> None:
    """From now on `attachment.call(call, module, args, kwargs)` answers the transformer's calls."""
    if not isinstance(transformer, CachedTransformer):
        kind = type(transformer)
        _change_class(transformer, cached_class(kind))  # type: ignore[arg-type]  # mypy: a class of unhashable objects
    transformer.__dict__["_ertacache"] = attachment


def follow(pipe: Any, attachment: Any) -> None:
    """From now on every call of the pipeline ends with `attachment.finish()`."""
    if ADDED not in vars(type(pipe)) and callable(pipe):
        kind = type(pipe)
        _change_class(pipe, followed_class(kind))  # type: ignore[arg-type]  # the same
    pipe.__dict__["_ertacache"] = attachment


def take_off(instance: Any) -> None:
    """Undo `put_in_front` or `follow`; a class that was written with the mixin stays."""
    instance.__dict__.pop("_ertacache", None)
    original = vars(type(instance)).get(ADDED)
    if original is not None:
        _change_class(instance, original)


def _change_class(instance: Any, kind: type) -> None:
    # past __setattr__, which compiled modules pass on to the module inside them
    object.__setattr__(instance, "__class__", kind)
