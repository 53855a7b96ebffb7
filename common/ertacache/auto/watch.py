"""Watch a user's own runs: record them as they pass by, and keep what it takes to make each call again."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache.attach import Attachment, Structure
from ertacache.cache import Cache, Call, Coefficients
from ertacache.errors import CalibrationError
from ertacache.fit.record import Recording
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs
from ertacache.fit.store import TrajectoryStore
from ertacache.fit.together import check_repeats
from ertacache.intercept import Interception

GUIDANCE = re.compile("guidance|cfg")  # in the names of arguments
ENCODE = "encode_prompt"
CALLBACK = "callback_on_step_end"
CALLBACKS = "callback"  # what the names of a call's callbacks and of their options begin with


# -- the call ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """A random generator as it was: where it lives, and its state."""

    device: torch.device
    state: Tensor

    def generator(self) -> torch.Generator:
        made = torch.Generator(self.device)
        made.set_state(self.state)
        return made


@dataclass(frozen=True)
class Copied:
    """A copy of a tensor on the host, and where it was."""

    values: Tensor
    device: torch.device


class PipelineCall:
    """One call of a pipeline that can be made again with the same arguments and the same noise.

    Args:
        call: the function of the pipeline's class.
    """

    def __init__(self, pipe: Any, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]):
        bound = inspect.signature(call).bind(pipe, *args, **kwargs)  # TypeError for wrong ones, as the call's own
        parameters = inspect.signature(call).parameters
        self.arguments: dict[str, Any] = {}
        for name in list(bound.arguments)[1:]:
            starred = parameters[name].kind
            if starred is inspect.Parameter.VAR_POSITIONAL:
                raise CalibrationError(f"{type(pipe).__name__} takes *{name}: its calls cannot be made again")
            given = bound.arguments[name]
            self.arguments.update(given if starred is inspect.Parameter.VAR_KEYWORD else {name: given})
        scales = [name for name in parameters if GUIDANCE.search(name) and name != "guidance_scale"]
        # beside the one that pipelines have as a property: (the call's own, the default)
        self.guidance = {n: (self.arguments.get(n, parameters[n].default), parameters[n].default) for n in scales}
        self.encoded: list[Any] = []  # while a fit makes the call again and again
        self.takes_output_type = "output_type" in parameters
        # before the call, which moves them on
        self.noise = {id(g): Noise(g.device, g.get_state()) for g in _generators(self.arguments)}
        self.seeds = [g.initial_seed() for g in _generators(self.arguments)]
        self.host_state = torch.get_rng_state()
        self.device_states: dict[torch.device, Tensor] = {}
        if torch.cuda.is_available():
            devices = {p.device for p in pipe.transformer.parameters()} | {getattr(pipe, "_execution_device", None)}
            self.device_states = {d: torch.cuda.get_rng_state(d) for d in devices if d and d.type == "cuda"}

    @property
    def decodes(self) -> bool:
        """Whether its result is decoded, so that it can be compared in pixels."""
        return self.takes_output_type and self.arguments.get("output_type") != "latent"

    def keep(self) -> None:
        """Copy the arguments, which are the user's to change afterwards."""
        self.arguments = {k: self._kept(v) for k, v in self.arguments.items() if not k.startswith(CALLBACKS)}

    def again(self, pipe: Any, output_type: str) -> Any:
        """Make the call, and leave all generators as they are."""
        arguments = {name: _restored(value) for name, value in self.arguments.items()}
        if self.takes_output_type:
            arguments["output_type"] = output_type
        with torch.random.fork_rng(list(self.device_states)):
            torch.set_rng_state(self.host_state)
            for device, state in self.device_states.items():
                torch.cuda.set_rng_state(state, device)
            with self._encoding_once(pipe):
                return pipe(**arguments)

    @contextmanager
    def _encoding_once(self, pipe: Any) -> Iterator[None]:
        """Remember what the prompt is encoded to: a text encoder may be as large as the transformer."""
        encode, own, turn = getattr(pipe, ENCODE, None), vars(pipe).get(ENCODE), itertools.count()

        def remembered(*args: Any, **kwargs: Any) -> Any:
            place = next(turn)
            if place == len(self.encoded):
                self.encoded.append(encode(*args, **kwargs))  # type: ignore[misc]
            return _cloned(self.encoded[place])

        if encode is not None:
            vars(pipe)[ENCODE] = remembered
        try:
            yield
        finally:
            vars(pipe).pop(ENCODE, None)
            if own is not None:
                vars(pipe)[ENCODE] = own

    def plain(self) -> dict[str, Any]:
        """Arguments that a calibration file names."""
        plain = {k: v for k, v in self.arguments.items() if isinstance(v, (int, float, str, bool))}
        return {k: v for k, v in plain.items() if k not in ("prompt", "output_type", "return_dict")}

    def prompts(self) -> list[str]:
        prompt = self.arguments.get("prompt")
        return [prompt] if isinstance(prompt, str) else [str(p) for p in prompt] if isinstance(prompt, list) else []

    def _kept(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return self.noise[id(value)]
        if isinstance(value, Tensor):
            return Copied(value.detach().to("cpu", copy=True), value.device)
        if isinstance(value, np.ndarray):
            return value.copy()
        if type(value) in (list, tuple):
            return type(value)(self._kept(item) for item in value)
        if type(value) is dict:
            return {key: self._kept(item) for key, item in value.items()}
        copied = getattr(value, "copy", None)
        return copied() if type(value).__module__.startswith("PIL.") and callable(copied) else value


def _restored(value: Any) -> Any:
    if isinstance(value, Noise):
        return value.generator()
    if isinstance(value, Copied):
        return value.values.to(value.device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(map(_restored, value))
    if type(value) is dict:
        return {key: _restored(item) for key, item in value.items()}
    return value


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value


def _generators(value: Any) -> list[torch.Generator]:
    if isinstance(value, torch.Generator):
        return [value]
    items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return [found for item in items for found in _generators(item)]


class SeenCallback:
    """A user's callback, and whether it changed the run: then the call's own arguments no longer tell all of it.

    Args:
        watched: whether the run is watched; otherwise nothing is looked at.
    """

    def __init__(self, callback: Callable[..., Any], watched: Callable[[], bool]):
        self.callback, self.watched, self.changed = callback, watched, False

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if not self.watched():
            return self.callback(pipe, step, timestep, tensors)
        given, scale = dict(tensors), getattr(pipe, "guidance_scale", None)
        before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
        result = self.callback(pipe, step, timestep, tensors)
        after = result if isinstance(result, dict) else tensors
        self.changed |= getattr(pipe, "guidance_scale", None) != scale or any(
            after.get(name, value) is not value or not torch.equal(value, before.get(name, value))
            for name, value in given.items()
            if isinstance(value, Tensor)
        )
        return result


# -- the run -----------------------------------------------------------------------------------------------


class Watching(Recording):
    """Record a run without touching it: whatever fails here costs the record, never the run."""

    failure: Exception | None = None

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        self._try(lambda: Recording.output(self, step, call, scheduler))
        return call.model_output

    def stepped(self, step: int, latents: Tensor) -> None:
        """Keep the latents after a step."""
        self._try(lambda: Recording.stepped(self, step, latents))

    @property
    def ended(self) -> bool:
        """Whether the run came to its last step."""
        return self.failure is not None or len(self.latents) == len(self.timesteps) + 1

    def _try(self, keep: Callable[[], Any]) -> None:
        if self.failure is not None:
            return
        try:
            keep()
        except Exception as error:
            self.failure = error
            self.latents, self.outputs = [], []

    def check(self) -> None:
        """Raise the failure, or CalibrationError where the run came to nothing that can be fitted to."""
        if self.failure is not None:
            raise self.failure
        if not bool(torch.isfinite(self.latents[-1]).all()):
            raise CalibrationError("its result holds NaN or Inf")


class Uncached(Cache):
    """Let a run be."""

    def __init__(self) -> None:
        super().__init__((), Coefficients.of_outputs([]))

    def computes(self, step: int) -> bool:
        return True

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        return call.model_output


@dataclass
class WatchedRuns(Runs):
    """The runs of one call of the user's, which is made again as it was: no micro-batches."""

    again: PipelineCall = field(kw_only=True)
    lend: Callable[..., AbstractContextManager[Attachment]] = field(kw_only=True)  # what is attached already
    store: TrajectoryStore = field(kw_only=True)  # of what was recorded
    weights: str | None = field(kw_only=True)  # the model's at that time, with adapters

    def __len__(self) -> int:
        return len(self.record)

    def _attached(self, begin: Callable[[Any], Cache], **options: Any) -> AbstractContextManager[Attachment]:
        return self.lend(begin, **options)

    def _again(self, output_type: str) -> Any:
        return self.again.again(self.pipe, output_type)

    def _call(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        return interception.run(*args, **kwargs)

    def _structure(self) -> Structure | None:
        return self.structure

    def _learn(self, structure: Structure | None) -> None:
        self.structure = structure or self.structure

    @property
    def nbytes(self) -> int:
        """Of the recorded tensors."""
        return sum(t.nbytes for t in (*self.record.latents, *self.record.outputs))

    @property
    def bytes_in_memory(self) -> int:
        """Of those that do not lie in files."""
        return self.nbytes if self.store.in_memory else 0

    def replayed(self, decode: bool) -> Tensor | None:
        """Make the call once more with all recorded outputs, and return its pixels (P, ...).

        Raises CalibrationError: it does not lead where it led; its noise or its arguments are others by now.
        """
        steps = range(self.record.num_steps)
        given = Rerun(list(steps), Coefficients.of_outputs([[1.0]] * len(steps)), self.record.outputs)
        last: list[Tensor] = []
        result = self._run(given, decode, lambda _, latents: last.__setitem__(slice(None), [latents]))
        check_repeats(last[0].cpu(), self.record.latents[-1], "another result")
        return result if decode else None


def with_pixels(runs: WatchedRuns, decode: bool) -> WatchedRuns:
    """The runs, checked, with their decoded results where they are wanted."""
    pixels = runs.replayed(decode)
    return runs if pixels is None else replace(runs, record=replace(runs.record, pixels=pixels))
