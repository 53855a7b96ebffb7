"""Attach a cache to a pipeline: its transformer's call and its scheduler's step, both on the instance.

The scheduler's step is where the model output is guided already, whatever the guidance, so there is one history and
no branch to keep apart. On a reused step the transformer returns a placeholder, an expanded zero that takes no memory,
and the scheduler gets the cache's combination instead.
"""

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ertacache.cache import Cache, Coefficients
from ertacache.errors import MismatchError, MismatchWarning, NumericsError, StateError
from ertacache.intercept import (
    ATTACHED,
    Interception,
    Method,
    attachment_of,
    check_free,
    follow,
    release,
    uncompiled,
    unfollow,
)
from ertacache.solver import StepCall, StepSignature, first_output, host_grid

# names of components hold one of these; what they make serves one step only, so they rest where it is reused
NETWORK_NAMES = ("transformer", "controlnet")
TIMESTEP_TOLERANCE = 1e-3  # of a grid's largest timestep: 1 in 0 .. 1000


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


class Refused(Cache):
    """The cache of a run that cannot be played: the first thing that it is asked raises why."""

    def __init__(self, error: MismatchError):
        super().__init__((), Coefficients.of_outputs([]))
        self.error = error

    def computes(self, step: int) -> bool:
        raise self.error

    def output(self, step: int, call: Any, scheduler: Any = None) -> Tensor:
        raise self.error


class PipelineCall(NamedTuple):
    """A call of a pipeline that is attached to, or of a copy of it."""

    pipe: Any
    args: tuple | None  # None for a loop of one's own, which calls no pipeline
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """One scheduler that a run steps, and its latents; most pipelines have one, those of video with audio two.

    Attributes:
        index: the stream's own among those of the run, in the order of their first steps.
        step: the next one, counted from the first that the run makes.
        first: index in the grid of the run's first step; not 0 where a run starts in the middle.
    """

    index: int
    scheduler: Any
    cache: Cache
    timesteps: list[float]
    step: int = 0
    first: int = 0

    def check(self, call: StepCall) -> None:
        """Raise StateError unless this is the scheduler's call of the present step.

        The timestep is compared without reading from a device: by its place in the grid's memory, or its value. A
        device is waited for once a run at most, at its first step, for a loop that copies its timesteps.
        """
        timestep = call.arguments.get("timestep")
        index = place_in_grid(timestep, self.scheduler.timesteps)
        value = None
        if index is None and isinstance(timestep, (int, float, Tensor)):
            known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu" or self.step == 0
            values = torch.as_tensor(timestep) if known else None
            value = float(values) if values is not None and values.numel() == 1 and not values.is_meta else None
        if self.step == 0:
            self.first = self._first(index, value)
        place = self.first + self.step
        if index is not None and index != place:
            self._refuse(f"is at step {index} of the grid")
        if place >= len(self.timesteps):
            self._refuse("comes after the end of the grid")
        if value is not None and abs(value - self.timesteps[place]) > TIMESTEP_TOLERANCE * max(self.timesteps):
            self._refuse(f"has timestep {value:g}, the grid has {self.timesteps[place]:g} there")

    def _first(self, index: int | None, value: float | None) -> int:
        begin = getattr(self.scheduler, "begin_index", None)
        if begin:
            return int(begin)
        if index is None and value is not None:
            return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - value))
        return index or 0

    def _refuse(self, what: str) -> None:
        raise StateError(
            f"step {self.step} of the run {what}; ERTACache needs a run that visits every step of the grid in order"
        )


@dataclass
class Run:
    """One run of a pipeline, from set_timesteps to its last step; host state but for the caches' tensors.

    Attributes:
        cache: of the first stream; its schedule is that of all.
        grids: of the schedulers whose grid was set, with their timesteps.
        blanks: a placeholder for each call within a step, shaped like its last output.
        streams: by the schedulers' ids.
        samples: that transformers saw in this step.
    """

    cache: Cache
    grids: list[tuple[Any, list[float]]]
    blanks: list[Any]
    streams: dict[int, Stream] = field(default_factory=dict)
    step: int = 0
    calls: int = 0
    samples: int = 0
    finite: FiniteCheck = field(default_factory=FiniteCheck)

    def new_stream(self, scheduler: Any) -> Stream:
        """The stream of a scheduler that makes its first step."""
        index = len(self.streams)
        if self.step > 0 and (index == 0 or self.step > 1 or self.calls):
            raise StateError(
                f"another scheduler begins at step {self.step} of the run: ERTACache follows those that make every step"
            )
        known = [timesteps for one, timesteps in self.grids if one is scheduler]
        timesteps = known[0] if known else host_grid(scheduler)[0]
        made = self.streams[id(scheduler)] = Stream(index, scheduler, self.cache.stream(index), timesteps)
        return made

    def placeholder(self, given: tuple = ()) -> Any:
        """What this call of a reused step returns: zeros that take no memory, in the shape that it had.

        Args:
            given: arguments of the call, the first of which tells the batch of a call that no computed step had.
        """
        if self.calls <= len(self.blanks):
            return self.blanks[self.calls - 1]
        if not self.blanks:
            raise StateError("a step is to be reused before any was computed: step 0 must be computed")
        return blank_of(self.blanks[0], len(given[0]) if given and isinstance(given[0], (Tensor, list)) else None)

    def end(self) -> None:
        """Drop the tensors of all caches."""
        self.cache.end()
        for stream in self.streams.values():
            stream.cache.end()


class Attachment:
    """Follow the runs of one pipeline and its copies. A run belongs to the thread that began it.

    Args:
        begin: makes the cache of a run from the scheduler, whose grid is set; may change the grid, or refuse.
        started: told of each stream the latents that it starts from, its first step in the grid, and its index.
        stepped: told each step, the latents after it, and the stream's index.
        guided: told at each computed step how many samples transformers saw for each sample of the latents.
        call: makes a network's call on a computed step, as `call(interception, args, kwargs)`.
        check: when outputs are looked through for NaN and Inf: at every "step", at the "end" of a run, or never (None).
        blanks: placeholders, for runs whose first step is not computed.
    """

    def __init__(
        self,
        pipe: Any,
        begin: Callable[[Any], Cache],
        *,
        started: Callable[[Tensor, int, int], None] | None = None,
        stepped: Callable[[int, Tensor, int], None] | None = None,
        guided: Callable[[int, float], None] | None = None,
        call: Callable[[Interception, tuple, dict[str, Any]], Any] | None = None,
        check: str | None = "end",
        blanks: list[Any] | None = None,
    ):
        self.pipe, self.begin, self.check, self.blanks = pipe, begin, check, blanks or []
        self.started, self.stepped, self.guided, self.call = started, stepped, guided, call
        self.interceptions: dict[str, Interception] = {}
        self.methods: list[Method] = []
        self.runs: dict[int, Run | None] = {}  # by thread; None for one of a pipeline that is not attached
        self.calls: dict[int, PipelineCall] = {}  # by thread
        self.computed_calls = self.reused_calls = 0
        self.handle: Any = None  # what `apply` returned

    # -- attaching ---------------------------------------------------------------------------------------

    def attach(self) -> "Attachment":
        schedulers, networks = schedulers_of(self.pipe), networks_of(self.pipe)
        for scheduler in schedulers:
            present = scheduler.__dict__.get("step")
            if isinstance(present, Method) and present.owner.interceptions:
                raise StateError(
                    "this scheduler is attached already, as part of another pipeline: ertacache.remove that one, or "
                    "give this one a copy.deepcopy of the scheduler"
                )
            release(scheduler)
        for network in networks.values():
            check_free(network)
        steps = [Method(scheduler, "step", self._step, self) for scheduler in schedulers]
        # the last thing that may refuse
        self.signatures = {type(step.scheduler): StepSignature.of(step.signature) for step in steps}
        for name, network in networks.items():
            self.interceptions[name] = self._intercepted(name, network)
        grids = [Method(scheduler, "set_timesteps", self._set_timesteps, self) for scheduler in schedulers]
        self.methods = [method.put_on() for method in [*steps, *grids]]
        follow(self.pipe, self)
        return self

    def detach(self) -> None:
        """Leave the pipeline as it was before `attach`; does nothing the second time."""
        if not self.interceptions:
            return
        for run in self.runs.values():
            if run is not None:
                run.end()
        self.runs.clear()
        for interception in self.interceptions.values():
            interception.take_off()
        self.interceptions.clear()
        for method in self.methods:
            method.take_off()
        self.methods.clear()  # with the interceptions: no circle keeps what a run recorded
        unfollow(self.pipe)

    def _intercepted(self, name: str, network: nn.Module) -> Interception:
        made = Interception(network, self._answer, self, name)
        made.put_on()
        return made

    def follow_copy(self, pipe: Any) -> None:
        """Answer the networks of a deep copy of the pipeline too: torch copies modules without what stands before."""
        if self.interceptions:
            for name, network in networks_of(pipe).items():
                self._intercepted(name, network)

    def _follow_compiled(self) -> None:
        """Move in front of a wrapper that `torch.compile` has put around a network since."""
        for name, network in networks_of(self.pipe).items():
            old = self.interceptions.get(name)
            if old is not None and network is old.module:
                continue
            if old is None or uncompiled(network) is not uncompiled(old.module):
                raise StateError(f"the pipeline's {name} was replaced after ertacache.apply: remove and apply again")
            old.take_off()
            self.interceptions[name] = self._intercepted(name, network)

    # -- the pipeline's side -----------------------------------------------------------------------------

    @property
    def caller(self) -> PipelineCall:
        """The pipeline's call that this thread is in."""
        return self.calls.get(threading.get_ident()) or PipelineCall(self.pipe, None, {})

    @property
    def after_first_step(self) -> bool:
        """Whether this thread's run has made a step, and has steps left to make."""
        run = self.runs.get(threading.get_ident())
        return run is not None and run.step > 0

    @contextmanager
    def call_of(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """Know of one call of the pipeline or a copy, and end with it the run that it began."""
        thread = threading.get_ident()
        self.finish()  # of a grid that was set before, for a loop that never came
        outer, self.calls[thread] = self.calls.get(thread), PipelineCall(pipe, args, kwargs)
        try:
            yield
            run = self.runs.get(thread)
            if run is not None:  # the loop ended before the grid did
                run.finite.verify(run.cache.computes)
        finally:
            self.finish()
            if outer is None:
                del self.calls[thread]
            else:
                self.calls[thread] = outer

    def _stranger(self) -> Any:
        """The pipeline that makes this call, where it has parts of the attached one but was not attached itself."""
        if threading.get_ident() in self.calls:
            return None
        loaded = (sys.modules.get(f"diffusers.{name}") for name in PIPELINE_CLASSES)
        kinds = tuple(getattr(m, n) for m, n in zip(loaded, PIPELINE_CLASSES.values(), strict=True) if m)
        frame: Any = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, kinds):
                return None if owner is self.pipe or vars(owner).get(ATTACHED) is self else owner
            frame = frame.f_back
        return None

    # -- the networks' side ------------------------------------------------------------------------------

    def _answer(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a network, or return a placeholder for its output."""
        run = self.runs.get(threading.get_ident())
        if run is None:  # outside a run a network is somebody else's: it runs as ever
            return self._outside(interception)(*args, **kwargs)
        run.calls += 1
        if run.cache.computes(run.step):
            output = self.call(interception, args, kwargs) if self.call else interception.run(*args, **kwargs)
            run.blanks[run.calls - 1 :] = [blank_of(output), *run.blanks[run.calls :]]
            if "transformer" in interception.name:
                run.samples += samples_of(output)
            self.computed_calls += 1
            return output
        self.reused_calls += 1
        if isinstance(interception.module, CachedTransformer) and interception.is_direct:
            return interception.run(*args, **kwargs)  # its own forward asks
        return run.placeholder(args or tuple(kwargs.values()))

    def _outside(self, interception: Interception) -> Callable[..., Any]:
        if not self.interceptions:  # of a copy that outlived the attachment
            interception.take_off()
        elif threading.get_ident() not in self.runs:
            self._check_scheduler()
        return interception.run

    def _check_scheduler(self) -> None:
        step = self.caller.pipe.scheduler.__dict__.get("step")
        if not (isinstance(step, Method) and step.owner is self):
            raise StateError("the pipeline's scheduler was replaced after ertacache.apply: remove and apply again")

    # -- the scheduler's side ----------------------------------------------------------------------------

    def _set_timesteps(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.interceptions:  # of a copy that outlived the attachment
            release(method.scheduler)
            return method.original(*args, **kwargs)
        thread, scheduler = threading.get_ident(), method.scheduler
        run = self.runs.get(thread)
        if run is not None and not run.calls and not run.step and all(s is not scheduler for s, _ in run.grids):
            result = method.original(*args, **kwargs)  # a further stream of a run that begins
            run.grids.append((scheduler, host_grid(scheduler)[0]))
            return result
        for other, one in list(self.runs.items()):
            if other in self.calls and other != thread and one and any(s is scheduler for s, _ in one.grids):
                raise StateError(
                    "another thread runs with this scheduler: give each a copy.copy(pipe) whose scheduler is a "
                    "copy.deepcopy of the pipeline's"
                )
        self.finish()
        stranger = self._stranger()
        if stranger is not None:
            warnings.warn(
                f"{type(stranger).__name__} shares parts with a pipeline that ERTACache is applied to, but is not "
                "attached itself, so it runs uncached: remove the other, then apply to this one",
                MismatchWarning,
                stacklevel=3,
            )
            self.runs[thread] = None
            return method.original(*args, **kwargs)
        self._follow_compiled()
        result = method.original(*args, **kwargs)
        try:
            cache = self.begin(scheduler)
        except MismatchError as error:
            if thread in self.calls:
                raise
            cache = Refused(error)  # a server may set the grid before the pipeline sets another one
        blanks = list(getattr(cache, "blanks", None) or self.blanks)
        self.runs[thread] = Run(cache, [(scheduler, host_grid(scheduler)[0])], blanks)
        return result

    def _step(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        thread = threading.get_ident()
        run = self.runs.get(thread)
        if run is None:
            if thread in self.runs:
                return method.original(*args, **kwargs)
            raise StateError("scheduler.step was called outside a run: call scheduler.set_timesteps first")
        call = self.signatures[type(method.scheduler)].call(args, kwargs)
        stream = run.streams.get(id(method.scheduler)) or run.new_stream(method.scheduler)
        stream.check(call)
        step, leads = stream.step, stream.index == 0
        if step == 0 and self.started is not None:
            self.started(call.sample, stream.first, stream.index)
        if not leads and step != run.step - 1:
            raise StateError(f"a scheduler is at step {step} of the run, another one at step {run.step}")
        if leads and not run.calls:
            raise StateError(
                f"step {step} came without a call of the transformer that ERTACache is attached to: another "
                "module, another thread, or its forward was called directly; apply to the one that is called"
            )
        if run.samples and leads and self.guided is not None:
            self.guided(step, run.samples / len(call.sample))
        cache = stream.cache  # `guided` may have changed it
        output = cache.output(step, call, stream.scheduler)
        if self.check is not None:
            run.finite.see(step, output)
            if self.check == "step":
                run.finite.verify(cache.computes)
        result = method.original(**call.with_output(output).arguments)
        if self.stepped is not None:
            self.stepped(step, first_output(result), stream.index)
        stream.step += 1
        if leads:
            run.step, run.calls, run.samples = stream.step, 0, 0
        if stream.step == len(stream.timesteps) - stream.first:
            self._may_end(run)
        return result

    def _may_end(self, run: Run) -> None:
        """End a run all of whose streams have made their last step."""
        if len(run.streams) < len(run.grids) or any(stream.step != run.step for stream in run.streams.values()):
            return  # where a scheduler's grid was set that is never stepped, the end of the call will tell
        self.finish()
        run.finite.verify(run.cache.computes)

    def finish(self) -> None:
        """End this thread's run, whole or given up: hold nothing of it."""
        run = self.runs.pop(threading.get_ident(), None)
        if run is not None:
            if self.stepped is not None:  # for the next run of a calibration
                self.blanks = run.blanks
            run.end()


class CachedTransformer:
    """Mixin of a transformer class whose own forward asks whether its step is reused; see a model folder's."""

    def reused_output(self) -> Any:
        """What forward returns in place of running, on a reused step; None on a computed one and outside a run."""
        if torch.compiler.is_compiling():  # of a compiled module the attachment decides, outside of what is traced
            return None
        attachment = attachment_of(self)
        run = attachment.runs.get(threading.get_ident()) if isinstance(attachment, Attachment) else None
        return None if run is None or run.cache.computes(run.step) else run.placeholder()


# where they are, and their names: never loaded from here
PIPELINE_CLASSES = {
    "pipelines.pipeline_utils": "DiffusionPipeline",
    "modular_pipelines.modular_pipeline": "ModularPipeline",
}


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline that rest on reused steps, by name: transformers and ControlNets; transformer first."""
    parts = {"transformer": getattr(pipe, "transformer", None), **vars(pipe)}
    public = {name: part for name, part in parts.items() if not name.startswith("_") and isinstance(part, nn.Module)}
    return {name: part for name, part in public.items() if any(known in name for known in NETWORK_NAMES)}


def schedulers_of(pipe: Any) -> list[Any]:
    """The schedulers of a pipeline, its main one first."""
    parts = [pipe.scheduler, *(part for name, part in vars(pipe).items() if name.endswith("scheduler"))]
    found: list[Any] = []
    for part in parts:
        if all(hasattr(part, name) for name in ("step", "set_timesteps")) and all(part is not one for one in found):
            found.append(part)
    return found


def blank_of(output: Any, batch: int | None = None) -> Any:
    """A placeholder for a network's output: the same structure, with zeros that take no memory for its tensors.

    Args:
        batch: the first dimension of the tensors; None for their own.
    """
    if isinstance(output, Tensor):
        shape = output.shape if batch is None else (batch, *output.shape[1:])
        return torch.zeros((), dtype=output.dtype, device=output.device).expand(shape)
    if isinstance(output, Mapping):  # diffusers' outputs are: their fields by name
        blanks = {name: blank_of(value, batch) for name, value in output.items()}
        return blanks if type(output) is dict else type(output)(**blanks)
    if isinstance(output, (list, tuple)):
        inner = [blank_of(value, batch) for value in output]
        return type(output)(*inner) if hasattr(output, "_fields") else type(output)(inner)
    return output


def samples_of(output: Any) -> int:
    """How many samples a network's output holds: the first dimension of its first tensor, or the length of a list."""
    first = output if isinstance(output, Tensor) else first_output(output)
    return len(first) if isinstance(first, (Tensor, list, tuple)) else 0


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
