"""Attaches to a pipeline: its transformer's call and its scheduler's step, both on the instance.

`Attachment` follows a run (which step is next) and asks a controller what to do at it. There are three
controllers: `recording.Recorder` watches an uncached run, `fitting.Fitter` calibrates on the accelerated
trajectory, `replay.Replay` generates with a finished calibration.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ertacache.errors import StateError
from ertacache.solver import StepCall, first_output, host_grid

TRANSFORMER_NAMES = ("transformer", "transformer_2")
TIMESTEP_TOLERANCE = 1.0


class Controller(Protocol):
    """What happens in a run; every method is called by `Attachment`."""

    def begin(self, scheduler: Any) -> None:
        """A run begins; the scheduler's grid is set and may be changed."""

    def should_compute(self, step: int) -> bool:
        """Whether the transformer runs at this step."""

    def model_output(self, step: int, call: StepCall, scheduler: Any) -> Tensor:
        """The output that the scheduler is to get at this step."""

    def after_step(self, step: int, sample: Tensor) -> None:
        """The scheduler has stepped to `sample`."""

    def end(self) -> None:
        """The run is over, or given up: drop what it held."""


class CachedTransformer:
    """Mixin for a transformer class: its call runs the model on computed steps and not on reused ones.

    On a reused step it returns an expanded zero of the model output's shape and dtype: no memory, no work.
    The scheduler's step knows that the step is reused and takes the rectified output instead.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attachment = self.__dict__.get("_ertacache")
        if attachment is None:
            return super().__call__(*args, **kwargs)
        return attachment.call(super().__call__, self, args, kwargs)


@functools.cache
def cached_class(transformer_class: type) -> type:
    """`transformer_class` with `CachedTransformer` in front; it holds no state and keeps the name."""
    namespace = {"__module__": transformer_class.__module__, "__qualname__": transformer_class.__qualname__}
    return type(transformer_class.__name__, (CachedTransformer, transformer_class), namespace)


def put_in_front(transformer: nn.Module, attachment: Any) -> None:
    """From now on `attachment.call(call, module, args, kwargs)` answers the transformer's calls."""
    if not isinstance(transformer, CachedTransformer):
        transformer.__class__ = cached_class(type(transformer))
    transformer.__dict__["_ertacache"] = attachment


def take_off(transformer: nn.Module) -> None:
    """Undo `put_in_front`; a class that was written with the mixin stays."""
    transformer.__dict__.pop("_ertacache", None)
    original = type(transformer).__mro__[2]
    if type(transformer) is cached_class(original):
        transformer.__class__ = original


class Attachment:
    """Follows the runs of one pipeline; all of its state is on the host."""

    def __init__(self, pipe: Any, controller: Controller, micro_batch: int | None = None):
        self.pipe = pipe
        self.controller = controller
        self.micro_batch = micro_batch
        self.scheduler = pipe.scheduler
        self.transformers = [getattr(pipe, n) for n in TRANSFORMER_NAMES if getattr(pipe, n, None) is not None]
        self.step: int | None = None
        self.timesteps: list[float] = []
        self.structure: tuple[type, torch.Size, torch.dtype, torch.device] | None = None
        self.computed_calls = 0
        self.reused_calls = 0
        self.on_computed: Callable[[], None] = lambda: None

    # -- attaching ---------------------------------------------------------------------------------------

    def attach(self) -> "Attachment":
        for transformer in self.transformers:
            put_in_front(transformer, self)
        self._signature = inspect.signature(self.scheduler.step)
        self._original_step = self.scheduler.step
        self._original_set_timesteps = self.scheduler.set_timesteps
        # functions, not methods, so that they can carry the originals' signatures, which pipelines inspect
        self.scheduler.step = functools.wraps(self._original_step)(lambda *a, **k: self._step(*a, **k))
        self.scheduler.set_timesteps = functools.wraps(self._original_set_timesteps)(
            lambda *a, **k: self._set_timesteps(*a, **k)
        )
        self.pipe.__dict__["_ertacache"] = self
        return self

    def detach(self) -> None:
        """Leave the pipeline as it was before `attach`."""
        self._finish()
        for transformer in self.transformers:
            take_off(transformer)
        self.scheduler.__dict__.pop("step", None)
        self.scheduler.__dict__.pop("set_timesteps", None)
        self.pipe.__dict__.pop("_ertacache", None)

    # -- the transformer's side --------------------------------------------------------------------------

    def call(self, call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the transformer, or return an expanded zero in its place."""
        return self.compute(call, module, args, kwargs) if self.should_compute() else self.placeholder()

    def should_compute(self) -> bool:
        if self.pipe.scheduler is not self.scheduler:
            raise StateError("the pipeline's scheduler was replaced after ertacache.apply: remove and apply again")
        # outside a run the transformer is somebody else's: it runs as ever
        return self.step is None or self.controller.should_compute(self.step)

    def compute(self, call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = call_in_micro_batches(call, module, args, kwargs, self.micro_batch)
        tensor = first_output(output)
        self.structure = (type(output), tensor.shape, tensor.dtype, tensor.device)
        self.computed_calls += 1
        return output

    def placeholder(self) -> Any:
        if self.structure is None:
            raise StateError("a step is to be reused before any was computed: step 0 must be computed")
        self.reused_calls += 1
        kind, shape, dtype, device = self.structure
        tensor = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return (tensor,) if kind is tuple else kind(tensor)

    # -- the scheduler's side ----------------------------------------------------------------------------

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        self._finish()
        result = self._original_set_timesteps(*args, **kwargs)
        self.controller.begin(self.scheduler)
        self.timesteps = host_grid(self.scheduler)[0]
        self.step = 0
        return result

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        call = StepCall.bind(self._signature, args, kwargs)
        step = self._checked_step(call)
        output = self.controller.model_output(step, call, self.scheduler)
        new_args, new_kwargs = call.arguments_with(output)
        result = self._original_step(*new_args, **new_kwargs)
        self.controller.after_step(step, first_output(result))
        if self.controller.should_compute(step):
            self.on_computed()
        self.step = step + 1
        if self.step == len(self.timesteps):
            self._finish()
        return result

    def _checked_step(self, call: StepCall) -> int:
        if self.step is None:
            raise StateError("scheduler.step was called outside a run: call scheduler.set_timesteps first")
        begin = getattr(self.scheduler, "begin_index", None)
        if self.step == 0 and begin:
            raise StateError(f"the run starts at step {begin} of the grid; ERTACache needs a run from step 0")
        self._check_timestep(call.timestep)
        return self.step

    def _check_timestep(self, timestep: Any) -> None:
        """Compare with the host copy of the grid, unless that would read from a device."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return
        if isinstance(timestep, (int, float, Tensor)) and torch.as_tensor(timestep).numel() == 1:
            expected = self.timesteps[self.step]
            if abs(float(timestep) - expected) > TIMESTEP_TOLERANCE:
                raise StateError(
                    f"step {self.step} of the run has timestep {float(timestep):g}, the grid has {expected:g} there; "
                    "ERTACache needs a run that visits every step of the grid in order"
                )

    def _finish(self) -> None:
        self.step = None
        self.structure = None
        self.controller.end()


def call_in_micro_batches(call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], size: int | None) -> Any:
    """Call a transformer on slices of its batch, so that its peak memory stays that of `size` samples.

    Tensors are sliced whose first dimension is the batch of the first argument; position ids are not.
    """
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    names = list(bound.arguments)[1:]
    batch = bound.arguments[names[0]].shape[0] if names and isinstance(bound.arguments[names[0]], Tensor) else 1
    if size is None or batch <= size:
        return call(*args, **kwargs)

    def piece(name: str, value: Any, start: int) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value[start : start + size] if batched and not name.endswith("_ids") else value

    outputs = []
    for start in range(0, batch, size):
        sliced = {name: piece(name, bound.arguments[name], start) for name in names}
        outputs.append(call(**sliced))
    joined = torch.cat([first_output(output) for output in outputs])
    return (joined,) if isinstance(outputs[0], tuple) else type(outputs[0])(joined)


@contextmanager
def attached(pipe: Any, controller: Controller, micro_batch: int | None = None) -> Iterator[Attachment]:
    """Attach for the length of a block; used by calibration and comparison."""
    attachment = Attachment(pipe, controller, micro_batch).attach()
    try:
        yield attachment
    finally:
        attachment.detach()
