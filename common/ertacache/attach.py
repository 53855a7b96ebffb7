"""Attaches to a pipeline: its transformer's call and its scheduler's step, both on the instance.

`Attachment` follows a run (which step is next) and asks a controller what to do at it. The
controllers: `recording.Recorder` watches an uncached run, `fitting.Fitter` fits on the accelerated trajectory,
`rerun.Rerun` and `matrices.MatrixRun` run given coefficients, `replay.Replay` generates with a finished calibration.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ertacache.errors import StateError
from ertacache.finite import FiniteCheck
from ertacache.micro_batches import call_in_micro_batches
from ertacache.patching import follow, put_in_front, take_off, uncompiled
from ertacache.solver import StepCall, StepPlaces, first_output, host_grid

__all__ = ["Attachment", "Controller", "attached"]
TRANSFORMER_NAMES = ("transformer", "transformer_2")
TIMESTEP_TOLERANCE = 1.0  # in timesteps of 0 .. 1000

# class, shape, dtype and device of what the transformer returns
Structure = tuple[type, torch.Size, torch.dtype, torch.device]


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


class Attachment:
    """Follows the runs of one pipeline; all of its state is on the host.

    Args:
        micro_batch: how many samples the transformer sees at a time; None for all.
        check: when outputs are checked for NaN and Inf: at every "step", at the "end" of a run, or never (None).
    """

    def __init__(self, pipe: Any, controller: Controller, micro_batch: int | None = None, check: str | None = "step"):
        self.pipe, self.controller = pipe, controller
        self.micro_batch, self.check = micro_batch, check
        self.scheduler = pipe.scheduler
        self.transformers: dict[str, nn.Module] = {}
        self.step: int | None = None
        self.timesteps: list[float] = []
        self.structure: Structure | None = None
        self.expected: Structure | None = None  # for a run whose first output is known without computing it
        self.finite = FiniteCheck()
        self._zero: Tensor | None = None  # what placeholders are expanded from, once made
        self.computed_calls = 0
        self.reused_calls = 0
        self.on_computed: Callable[[], None] = lambda: None
        self.around: Callable[[Any], Any] = lambda call: call  # goes around the transformer's own call

    # -- attaching ---------------------------------------------------------------------------------------

    def attach(self) -> "Attachment":
        if isinstance(getattr(self.scheduler.__dict__.get("step"), "attachment", None), Attachment):
            raise StateError("this scheduler is attached already, as part of another pipeline: give each its own")
        self.transformers = self._present()
        for transformer in self.transformers.values():
            put_in_front(transformer, self)
        self._places = StepPlaces.of(inspect.signature(self.scheduler.step))
        self._original_step = self.scheduler.step
        self._original_set_timesteps = self.scheduler.set_timesteps
        self._replaced = {name: self.scheduler.__dict__.get(name) for name in ("step", "set_timesteps")}
        # functions, not methods, so that they can carry the originals' signatures, which pipelines inspect
        self.scheduler.step = functools.wraps(self._original_step)(lambda *a, **k: self._step(*a, **k))
        self.scheduler.set_timesteps = functools.wraps(self._original_set_timesteps)(
            lambda *a, **k: self._set_timesteps(*a, **k)
        )
        self.scheduler.step.attachment = self
        follow(self.pipe, self)
        return self

    def detach(self) -> None:
        """Leave the pipeline as it was before `attach`."""
        self.finish()
        for transformer in self.transformers.values():
            take_off(transformer)
        for name, own in self._replaced.items():
            self.scheduler.__dict__.pop(name, None)
            if own is not None:
                self.scheduler.__dict__[name] = own
        take_off(self.pipe)

    def _present(self) -> dict[str, nn.Module]:
        return {n: getattr(self.pipe, n) for n in TRANSFORMER_NAMES if getattr(self.pipe, n, None) is not None}

    def _follow_compiled(self) -> None:
        """Move in front of a wrapper that `torch.compile` has put around a transformer since."""
        for name, transformer in self._present().items():
            old = self.transformers.get(name)
            if transformer is old:
                continue
            if old is None or uncompiled(transformer) is not uncompiled(old):
                raise StateError(f"the pipeline's {name} was replaced after ertacache.apply: remove and apply again")
            take_off(old)
            put_in_front(transformer, self)
            self.transformers[name] = transformer

    # -- the transformer's side --------------------------------------------------------------------------

    def call(self, call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the transformer, or return an expanded zero in its place."""
        if self.pipe.scheduler is not self.scheduler:
            raise StateError("the pipeline's scheduler was replaced after ertacache.apply: remove and apply again")
        if self.step is None or threading.get_ident() != self._thread:
            return call(*args, **kwargs)  # outside a run the transformer is somebody else's: it runs as ever
        computes = self.controller.should_compute(self.step)
        return self.compute(call, module, args, kwargs) if computes else self.placeholder()

    def compute(self, call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = call_in_micro_batches(self.around(call), module, args, kwargs, self.micro_batch)
        tensor = first_output(output)
        self.structure = self.expected = (type(output), tensor.shape, tensor.dtype, tensor.device)
        self.computed_calls += 1
        return output

    def placeholder(self) -> Any:
        structure = self.structure or self.expected
        if structure is None:
            raise StateError("a step is to be reused before any was computed: step 0 must be computed")
        self.reused_calls += 1
        kind, shape, dtype, device = structure
        if self._zero is None or (self._zero.dtype, self._zero.device) != (dtype, device):
            self._zero = torch.zeros((), dtype=dtype, device=device)
        tensor = self._zero.expand(shape)
        return (tensor,) if kind is tuple else kind(tensor)

    # -- the scheduler's side ----------------------------------------------------------------------------

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        self.finish()
        self._follow_compiled()
        result = self._original_set_timesteps(*args, **kwargs)
        self.controller.begin(self.scheduler)
        self.timesteps = host_grid(self.scheduler)[0]
        self.step, self._thread = 0, threading.get_ident()
        self._calls_before = self.computed_calls + self.reused_calls
        return result

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        call = StepCall(self._places, args, kwargs)
        step = self._checked_step(call)
        output = self.controller.model_output(step, call, self.scheduler)
        if self.check is not None:
            self.finite.see(step, output)
        if self.check == "step":
            self.finite.verify(self.controller.should_compute)
        call = call.with_output(output)
        result = self._original_step(*call.args, **call.kwargs)
        self.controller.after_step(step, first_output(result))
        if self.controller.should_compute(step):
            self.on_computed()
        self.step = step + 1
        self._calls_before = self.computed_calls + self.reused_calls
        if self.step == len(self.timesteps):
            if self.check == "end":
                self.finite.verify(self.controller.should_compute)
            self.finish()
        return result

    def _checked_step(self, call: StepCall) -> int:
        if self.step is None:
            raise StateError("scheduler.step was called outside a run: call scheduler.set_timesteps first")
        begin = getattr(self.scheduler, "begin_index", None)
        if self.step == 0 and begin:
            raise StateError(f"the run starts at step {begin} of the grid; ERTACache needs a run from step 0")
        self._check_timestep(self.step, call.timestep)
        if self.computed_calls + self.reused_calls == self._calls_before:
            raise StateError(
                f"step {self.step} came without a call of the transformer that ERTACache is attached to: another "
                "module, another thread, or its forward was called directly; apply to the one that is called"
            )
        return self.step

    def _check_timestep(self, step: int, timestep: Any) -> None:
        """Compare with the grid without reading from a device: by its place in the grid's memory, or its value.

        A device is waited for once a run at most, at its first step, for a loop that copies its timesteps.
        """
        index = place_in_grid(timestep, self.scheduler.timesteps)
        if index is not None:
            if index != step:
                self._refuse_timestep(f"is at step {index} of the grid")
            return
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and step > 0:
            return
        if isinstance(timestep, (int, float, Tensor)) and torch.as_tensor(timestep).numel() == 1:
            expected = self.timesteps[step]
            if abs(float(timestep) - expected) > TIMESTEP_TOLERANCE:
                self._refuse_timestep(f"has timestep {float(timestep):g}, the grid has {expected:g} there")

    def _refuse_timestep(self, what: str) -> None:
        raise StateError(
            f"step {self.step} of the run {what}; ERTACache needs a run that visits every step of the grid in order"
        )

    def finish(self) -> None:
        """The run is over, or was given up: hold nothing of it."""
        self.step = None
        self.structure = self._zero = None
        self.finite.forget()
        self.controller.end()


def place_in_grid(timestep: Any, grid: Any) -> int | None:
    """Index in the grid of a timestep that is a view of it; None where it is something of its own."""
    if not (isinstance(timestep, Tensor) and isinstance(grid, Tensor)) or grid.is_meta or not grid.stride(0):
        return None
    if timestep.untyped_storage().data_ptr() != grid.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - grid.storage_offset()) // grid.stride(0)


@contextmanager
def attached(pipe: Any, controller: Controller, micro_batch: int | None = None) -> Iterator[Attachment]:
    """Attach for the length of a block; used by calibration and comparison."""
    attachment = Attachment(pipe, controller, micro_batch).attach()
    try:
        yield attachment
    finally:
        attachment.detach()
