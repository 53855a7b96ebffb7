"""Answer the calls of one module, and the methods of one scheduler, on the instance: no class changes.

torch looks for a compiled call on the instance before it runs a module's own; `Interception` stands there. What
hooks of offloading, LoRA layers and `module.compile()` do lies behind it, in whatever order they come.
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame

from ertacache.errors import StateError

SLOT = "_compiled_call_impl"  # of nn.Module, which calls what lies there instead of its own forward
ATTACHED = "_ertacache"  # instance attribute of a pipeline that is attached to
FOLLOWED = "_ertacache_original"  # class attribute of a pipeline class that was made here

# private to torch, so it may go away
inside_compiled_wrapper: Callable[[], bool] = getattr(eval_frame, "_is_in_optimized_module", lambda: False)

Answer = Callable[["Interception", tuple, dict[str, Any]], Any]


class Interception:
    """Stand before one module's call.

    Args:
        answer: called with this object and the call's arguments; `run` makes the call as it would be without.
        owner: the attachment that this is part of.
        name: of the module in its pipeline.
    """

    def __init__(self, module: nn.Module, answer: Answer, owner: Any, name: str = "transformer"):
        self.module, self.answer, self.owner, self.name = module, answer, owner, name
        self.compiled: Callable[..., Any] | None = None

    def put_on(self) -> None:
        """Answer the module's calls from now on."""
        space = self.module.__dict__  # past __setattr__, which wrappers of compiled modules pass on
        self.compiled = space.get(SLOT)
        space[SLOT] = self
        space["compile"] = CompileCall(self)

    def take_off(self) -> None:
        """Leave the module as it was, but for what was compiled since."""
        space = self.module.__dict__
        space.pop("compile", None)
        space.pop(SLOT, None)
        if self.compiled is not None:
            space[SLOT] = self.compiled

    # not traced: what changes from step to step in here would recompile the model at every step
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if inside_compiled_wrapper() and "_orig_mod" not in self.module._modules:
            raise StateError(
                "the transformer was wrapped by torch.compile after ertacache.apply and is called through the wrapper: "
                "apply again (compile first, then apply), or use transformer.compile(), which works in any order"
            )
        return self.answer(self, args, kwargs)

    @torch.compiler.disable(recursive=False)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module without an answer."""
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    @property
    def is_direct(self) -> bool:
        """Whether a call runs the class's forward straight away.

        A forward that is compiled would have a decision inside of it traced; one that is offloaded, whose hooks
        replace it on the instance, would fetch the weights first.
        """
        return self.compiled is None and uncompiled(self.module) is self.module and "forward" not in vars(self.module)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`module.compile`, which would take this object's place."""
        if self.module.__dict__.get(SLOT) is self:
            self.compiled = torch.compile(self.module._call_impl, *args, **kwargs)
        else:  # of a copy of the module, to which nothing is attached
            nn.Module.compile(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Interception":
        made = bare_copy(self)
        made.module = memo.get(id(self.module), self.module)
        return made

    def __reduce__(self) -> Any:
        return type(None), ()  # nothing is attached to a pickled module


class CompileCall:
    """An intercepted module's `compile`; a pickled module gets its class's back."""

    def __init__(self, interception: Interception):
        self.interception = interception

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.interception.compile(*args, **kwargs)

    def __reduce__(self) -> Any:
        return class_method, (self.interception.module, "compile")


class Method:
    """Take the place of one method of a scheduler; a deep copy of the scheduler takes its own along.

    Args:
        answer: called with this object and the call's arguments.
        owner: what `owner` of the copies is too.
    """

    def __init__(self, scheduler: Any, name: str, answer: Callable[..., Any], owner: Any):
        self.scheduler, self.name, self.answer, self.owner = scheduler, name, answer, owner
        self.original = getattr(scheduler, name)
        self.replaced = scheduler.__dict__.get(name)
        self.signature = inspect.signature(self.original)
        functools.update_wrapper(self, self.original)  # pipelines inspect it

    def put_on(self) -> "Method":
        """Answer the method's calls from now on."""
        self.scheduler.__dict__[self.name] = self
        return self

    def take_off(self) -> None:
        """Leave the scheduler as it was."""
        self.scheduler.__dict__.pop(self.name, None)
        if self.replaced is not None:
            self.scheduler.__dict__[self.name] = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Method":
        made = bare_copy(self)
        made.scheduler = memo.get(id(self.scheduler), self.scheduler)
        made.original = copy.deepcopy(self.original, memo)
        return made

    def __reduce__(self) -> Any:
        return class_method, (self.scheduler, self.name)  # nothing is attached to a pickled scheduler


def empty(kind: type) -> Any:
    """An object of a class without anything in it, for pickles."""
    return object.__new__(kind)


def class_method(owner: Any, name: str) -> Any:
    """An object's method as its class has it, for pickles."""
    return types.MethodType(getattr(type(owner), name), owner)


def bare_copy(part: Any) -> Any:
    """A shallow copy of an object, however it is pickled."""
    made = empty(type(part))
    made.__dict__.update(part.__dict__)
    return made


def attachment_of(part: Any) -> Any:
    """What is attached to a pipeline or a transformer; None for nothing."""
    interception = vars(part).get(SLOT)
    return interception.owner if isinstance(interception, Interception) else vars(part).get(ATTACHED)


def check_free(transformer: nn.Module) -> None:
    """Raise StateError where something is attached: two attachments would answer each other's calls."""
    if attachment_of(transformer) is not None:
        raise StateError(
            f"this {type(transformer).__name__} is attached already, alone or as part of another pipeline: "
            "ertacache.remove it there first"
        )


def release(scheduler: Any) -> None:
    """Take off what a copy of a scheduler has brought along from an attachment that is gone."""
    for method in [value for value in vars(scheduler).values() if isinstance(value, Method)]:
        method.take_off()


def uncompiled(module: Any) -> Any:
    """The module inside the wrapper that `torch.compile(module)` returns; any other module as it is."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)


@functools.cache
def followed_class(pipeline_class: type) -> type:
    """A subclass of the same name whose calls are told to the attachment; copies are attached, pickles are not."""
    original = pipeline_class.__call__

    @functools.wraps(original)  # pipelines' calls are inspected for their arguments
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = self.__dict__.get(ATTACHED)
        if attachment is None:
            return original(self, *args, **kwargs)
        with attachment.call_of(self, args, kwargs):
            return original(self, *args, **kwargs)

    def __copy__(self: Any) -> Any:
        return bare_copy(self)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = object.__new__(type(self))
        attachment = self.__dict__.get(ATTACHED)
        memo[id(attachment)] = attachment  # one for all copies: what a run holds belongs to the run
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if attachment is not None:
            attachment.follow_copy(made)
        return made

    def __reduce_ex__(self: Any, _: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != ATTACHED}
        return empty, (pipeline_class,), state

    methods = (__call__, __copy__, __deepcopy__, __reduce_ex__)
    names = {"__module__": pipeline_class.__module__, "__qualname__": pipeline_class.__qualname__}
    own = {method.__name__: method for method in methods}
    return type(pipeline_class.__name__, (pipeline_class,), {**names, FOLLOWED: pipeline_class, **own})


def follow(pipe: Any, attachment: Any) -> None:
    """Tell an attachment of each call of the pipeline, by `attachment.call_of()`."""
    if FOLLOWED not in vars(type(pipe)) and callable(pipe):
        kind: Any = type(pipe)
        pipe.__class__ = followed_class(kind)
    pipe.__dict__[ATTACHED] = attachment


def unfollow(pipe: Any) -> None:
    """Undo `follow`."""
    pipe.__dict__.pop(ATTACHED, None)
    original = vars(type(pipe)).get(FOLLOWED)
    if original is not None:
        pipe.__class__ = original
