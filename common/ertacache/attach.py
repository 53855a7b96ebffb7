"""Attach a cache to a pipeline: its transformer's call and its scheduler's step, both on the instance.

The scheduler's step is where the model output is guided already, whatever the guidance, so there is one history and
no branch to keep apart. On a reused step the transformer returns a placeholder, an expanded zero that takes no memory,
and the scheduler gets the cache's combination instead.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ertacache.cache import Cache
from ertacache.errors import NumericsError, StateError
from ertacache.intercept import Interception, Method, attachment_of, check_free, follow, release, uncompiled, unfollow
from ertacache.solver import StepCall, StepSignature, first_output, host_grid

TRANSFORMER_NAMES = ("transformer", "transformer_2")
TIMESTEP_TOLERANCE = 1.0  # in timesteps of 0 .. 1000


class Structure(NamedTuple):
    """What a transformer returns: class of the output, and shape, dtype and device of its first tensor."""

    kind: type
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class FiniteCheck:
    """Find the step at which a run stopped being finite, reading from the device once.

    Keeps one sum for each output on its device: it is finite only where every term is.
    """

    def __init__(self) -> None:
        self.sums: list[tuple[int, Tensor]] = []

    def see(self, step: int, output: Tensor) -> None:
        """Keep the sum of a step's output; a step may have several."""
        if not output.is_meta:  # a run on meta tensors has shapes only
            self.sums.append((step, output.detach().sum(dtype=torch.float32)))

    def verify(self, computes: Callable[[int], bool]) -> None:
        """Raise NumericsError naming the first step that is not finite; then forget all of them."""
        sums, self.sums = self.sums, []
        if not sums:
            return
        for (step, _), value in zip(sums, torch.stack([total for _, total in sums]).tolist(), strict=True):
            if not math.isfinite(value):
                raise NumericsError(
                    f"the model output at step {step} ({'computed' if computes(step) else 'reused'}) holds NaN or Inf, "
                    "so the result would too; in float16 an overflow is likely: use bfloat16 or float32"
                )


@dataclass
class Run:
    """One run of a pipeline, from set_timesteps to its last step; host state but for the cache's tensors."""

    scheduler: Any
    cache: Cache
    timesteps: list[float]
    structure: Structure | None
    step: int = 0
    calls: int = 0  # of the transformer in this step
    zero: Tensor | None = None  # what placeholders are expanded from
    finite: FiniteCheck = field(default_factory=FiniteCheck)

    def placeholder(self) -> Any:
        """An output of the transformer's own structure that holds zeros and no memory."""
        if self.structure is None:
            raise StateError("a step is to be reused before any was computed: step 0 must be computed")
        kind, shape, dtype, device = self.structure
        if self.zero is None or (self.zero.dtype, self.zero.device) != (dtype, device):
            self.zero = torch.zeros((), dtype=dtype, device=device)
        tensor = self.zero.expand(shape)
        return (tensor,) if kind is tuple else kind(tensor)

    def check(self, call: StepCall) -> None:
        """Raise StateError unless this is the scheduler's call of the present step.

        The timestep is compared without reading from a device: by its place in the grid's memory, or its value. A
        device is waited for once a run at most, at its first step, for a loop that copies its timesteps.
        """
        step, timestep = self.step, call.arguments.get("timestep")
        if step == 0 and getattr(self.scheduler, "begin_index", None):
            begin = self.scheduler.begin_index
            raise StateError(f"the run starts at step {begin} of the grid; ERTACache needs a run from step 0")
        index = place_in_grid(timestep, self.scheduler.timesteps)
        if index is not None and index != step:
            self._refuse(f"is at step {index} of the grid")
        known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu" or step == 0
        if index is None and known and isinstance(timestep, (int, float, Tensor)):
            values, expected = torch.as_tensor(timestep), self.timesteps[step]
            if values.numel() == 1 and abs(float(values) - expected) > TIMESTEP_TOLERANCE:
                self._refuse(f"has timestep {float(values):g}, the grid has {expected:g} there")
        if not self.calls:
            raise StateError(
                f"step {step} came without a call of the transformer that ERTACache is attached to: another "
                "module, another thread, or its forward was called directly; apply to the one that is called"
            )

    def _refuse(self, what: str) -> None:
        raise StateError(
            f"step {self.step} of the run {what}; ERTACache needs a run that visits every step of the grid in order"
        )


class Attachment:
    """Follow the runs of one pipeline. A run belongs to the thread that began it, and to its scheduler or a copy.

    Args:
        begin: makes the cache of a run from the scheduler, whose grid is set; may change the grid, or refuse.
        first_latents: told the latents that a run starts from.
        stepped: told each step and the latents after it.
        call: makes the transformer's call on a computed step, as `call(interception, args, kwargs)`.
        check: when outputs are looked through for NaN and Inf: at every "step", at the "end" of a run, or never (None).
        structure: of the transformer's output, for runs whose first step is not computed.
    """

    def __init__(
        self,
        pipe: Any,
        begin: Callable[[Any], Cache],
        *,
        first_latents: Callable[[Tensor], None] | None = None,
        stepped: Callable[[int, Tensor], None] | None = None,
        call: Callable[[Interception, tuple, dict[str, Any]], Any] | None = None,
        check: str | None = "end",
        structure: Structure | None = None,
    ):
        self.pipe, self.begin, self.check, self.structure = pipe, begin, check, structure
        self.first_latents, self.stepped, self.call = first_latents, stepped, call
        self.scheduler = pipe.scheduler
        self.interceptions: dict[str, Interception] = {}
        self.methods: list[Method] = []
        self.runs: dict[int, Run] = {}  # by thread
        self.computed_calls = self.reused_calls = 0

    # -- attaching ---------------------------------------------------------------------------------------

    def attach(self) -> "Attachment":
        present = self.scheduler.__dict__.get("step")
        if isinstance(present, Method) and present.owner.interceptions:
            raise StateError("this scheduler is attached already, as part of another pipeline: give each its own")
        release(self.scheduler)
        transformers = transformers_of(self.pipe)
        for transformer in transformers.values():
            check_free(transformer)
        step = Method(self.scheduler, "step", self._step, self)
        self.signature = StepSignature.of(step.signature)  # the last thing that may refuse
        for name, transformer in transformers.items():
            self.interceptions[name] = self._intercepted(transformer)
        self.methods = [step.put_on(), Method(self.scheduler, "set_timesteps", self._set_timesteps, self).put_on()]
        follow(self.pipe, self)
        return self

    def detach(self) -> None:
        """Leave the pipeline as it was before `attach`; does nothing the second time."""
        if not self.interceptions:
            return
        for run in self.runs.values():
            run.cache.end()
        self.runs.clear()
        for interception in self.interceptions.values():
            interception.take_off()
        self.interceptions.clear()
        for method in self.methods:
            method.take_off()
        self.methods.clear()  # with the interceptions: no circle keeps what a run recorded
        unfollow(self.pipe)

    def _intercepted(self, transformer: nn.Module) -> Interception:
        made = Interception(transformer, self._answer, self)
        made.put_on()
        return made

    def _follow_compiled(self) -> None:
        """Move in front of a wrapper that `torch.compile` has put around a transformer since."""
        for name, transformer in transformers_of(self.pipe).items():
            old = self.interceptions.get(name)
            if old is not None and transformer is old.module:
                continue
            if old is None or uncompiled(transformer) is not uncompiled(old.module):
                raise StateError(f"the pipeline's {name} was replaced after ertacache.apply: remove and apply again")
            old.take_off()
            self.interceptions[name] = self._intercepted(transformer)

    # -- the transformer's side --------------------------------------------------------------------------

    def _answer(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the transformer, or return a placeholder for its output."""
        run = self.runs.get(threading.get_ident())
        if run is None:  # outside a run the transformer is somebody else's: it runs as ever
            self._check_scheduler()
            return interception.run(*args, **kwargs)
        run.calls += 1
        if run.cache.computes(run.step):
            output = self.call(interception, args, kwargs) if self.call else interception.run(*args, **kwargs)
            tensor = first_output(output)
            run.structure = self.structure = Structure(type(output), tensor.shape, tensor.dtype, tensor.device)
            self.computed_calls += 1
            return output
        self.reused_calls += 1
        if isinstance(interception.module, CachedTransformer) and interception.is_direct:
            return interception.run(*args, **kwargs)  # its own forward asks
        return run.placeholder()

    def _check_scheduler(self) -> None:
        step = self.pipe.scheduler.__dict__.get("step")
        if not (isinstance(step, Method) and step.owner is self):
            raise StateError("the pipeline's scheduler was replaced after ertacache.apply: remove and apply again")

    # -- the scheduler's side ----------------------------------------------------------------------------

    def _set_timesteps(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.interceptions:  # of a copy that outlived the attachment
            release(method.scheduler)
            return method.original(*args, **kwargs)
        self.finish()
        self._follow_compiled()
        result = method.original(*args, **kwargs)
        cache = self.begin(method.scheduler)
        run = Run(method.scheduler, cache, host_grid(method.scheduler)[0], self.structure)
        self.runs[threading.get_ident()] = run
        return result

    def _step(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        run = self.runs.get(threading.get_ident())
        if run is None or run.scheduler is not method.scheduler:
            raise StateError("scheduler.step was called outside a run: call scheduler.set_timesteps first")
        call = self.signature.call(args, kwargs)
        run.check(call)
        if run.step == 0 and self.first_latents is not None:
            self.first_latents(call.sample)
        output = run.cache.output(run.step, call, run.scheduler)
        if self.check is not None:
            run.finite.see(run.step, output)
            if self.check == "step":
                run.finite.verify(run.cache.computes)
        call = call.with_output(output)
        result = method.original(**call.arguments)
        if self.stepped is not None:
            self.stepped(run.step, first_output(result))
        run.step, run.calls = run.step + 1, 0
        if run.step == len(run.timesteps):
            self.finish()
            run.finite.verify(run.cache.computes)
        return result

    def finish(self) -> None:
        """End this thread's run, whole or given up: hold nothing of it."""
        run = self.runs.pop(threading.get_ident(), None)
        if run is not None:
            run.cache.end()


class CachedTransformer:
    """Mixin of a transformer class whose own forward asks whether its step is reused; see a model folder's."""

    def reused_output(self) -> Any:
        """What forward returns in place of running, on a reused step; None on a computed one and outside a run."""
        if torch.compiler.is_compiling():  # of a compiled module the attachment decides, outside of what is traced
            return None
        attachment = attachment_of(self)
        run = attachment.runs.get(threading.get_ident()) if isinstance(attachment, Attachment) else None
        return None if run is None or run.cache.computes(run.step) else run.placeholder()


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers by name, where there are any."""
    return {name: part for name in TRANSFORMER_NAMES if (part := getattr(pipe, name, None)) is not None}


def place_in_grid(timestep: Any, grid: Any) -> int | None:
    """Index in the grid of a timestep that is a view of it; None where it is something of its own."""
    if not (isinstance(timestep, Tensor) and isinstance(grid, Tensor)) or grid.is_meta or not grid.stride(0):
        return None
    if timestep.untyped_storage().data_ptr() != grid.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - grid.storage_offset()) // grid.stride(0)


@contextmanager
def attached(pipe: Any, begin: Callable[[Any], Cache], **options: Any) -> Iterator[Attachment]:
    """Attach for the length of a block."""
    attachment = Attachment(pipe, begin, **options).attach()
    try:
        yield attachment
    finally:
        attachment.detach()
