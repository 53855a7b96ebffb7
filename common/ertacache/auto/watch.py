"""Watch a user's own runs: record them as they pass by, and keep what it takes to make each call again."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients
from ertacache.errors import CalibrationError
from ertacache.fit.lockstep import Lockstep, generator_state, joined, restore
from ertacache.fit.record import Record, Recording
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import SAME, TRIED_STEPS, Runs, pixels_of
from ertacache.fit.work import counted, shares
from ertacache.metrics import psnr
from ertacache.provenance import PLAIN, as_plain

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


class RepeatableCall:
    """One call of a pipeline that can be made again with the same arguments and the same noise."""

    def __init__(self, pipe: Any, args: tuple, kwargs: dict[str, Any]):
        signature = inspect.signature(type(pipe).__call__)
        bound = signature.bind(pipe, *args, **kwargs)  # TypeError for wrong ones, as the call's own
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        self.arguments: dict[str, Any] = {}
        for name in list(bound.arguments)[1:]:
            if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
                raise CalibrationError(f"{type(pipe).__name__} takes *{name}: its calls cannot be made again")
            given = bound.arguments[name]
            self.arguments.update(given if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: given})
        self.encoded: list[Any] = []  # while a fit makes the call again and again
        self.takes_output_type = "output_type" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values()
        # before the call, which moves them on
        self.noise = {id(g): Noise(g.device, g.get_state()) for g in _generators(self.arguments)}
        self.seeds = [g.initial_seed() for g in _generators(self.arguments)]
        self.state = generator_state()

    @property
    def decodes(self) -> bool:
        """Whether its result is decoded, so that it can be compared in pixels."""
        return self.takes_output_type and self.arguments.get("output_type") != "latent"

    def keep(self) -> None:
        """Copy the arguments, which are the user's to change afterwards."""
        self.arguments = {k: self._kept(v) for k, v in self.arguments.items() if not k.startswith(CALLBACKS)}

    def again(self, pipe: Any, output_type: str) -> Any:
        """Make the call on a copy of the pipeline; whoever asks puts the global generators back."""
        generators: dict[int, torch.Generator] = {}
        arguments = {name: _restored(value, generators) for name, value in self.arguments.items()}
        if self.takes_output_type:
            arguments["output_type"] = output_type
        self._encode_once(pipe)
        restore(self.state)
        return pipe(**arguments)

    def _encode_once(self, pipe: Any) -> None:
        """Remember what the prompt is encoded to: a text encoder may be as large as the transformer."""
        encode, turn = getattr(pipe, ENCODE, None), itertools.count()

        def remembered(*args: Any, **kwargs: Any) -> Any:
            place = next(turn)
            if place == len(self.encoded):
                self.encoded.append(encode(*args, **kwargs))  # type: ignore[misc]
            return _cloned(self.encoded[place])

        if encode is not None:
            vars(pipe)[ENCODE] = remembered

    def plain(self) -> dict[str, Any]:
        """Arguments that a calibration file names."""
        named = {k: v for k, v in self.arguments.items() if k not in ("prompt", "output_type", "return_dict")}
        return {k: p for k, v in named.items() if isinstance(p := as_plain(k, v), PLAIN)}

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


def _restored(value: Any, generators: dict[int, torch.Generator]) -> Any:
    if isinstance(value, Noise):  # one that is given twice goes on where it was
        return generators.setdefault(id(value), value.generator())
    if isinstance(value, Copied):
        return value.values.to(value.device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(_restored(item, generators) for item in value)
    if type(value) is dict:
        return {key: _restored(item, generators) for key, item in value.items()}
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

    def stepped(self, step: int, latents: Tensor, stream: int = 0) -> None:
        """Keep the latents after a step."""
        self._try(lambda: Recording.stepped(self, step, latents, stream))

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
        for one in (self, *self.streams):
            assert isinstance(one, Watching)
            if one.failure is not None:
                raise one.failure
            if not bool(torch.isfinite(one.latents[-1]).all()):
                raise CalibrationError("its result holds NaN or Inf")


class Uncached(Cache):
    """Let a run be."""

    def __init__(self) -> None:
        super().__init__((), Coefficients.of_outputs([]))

    def computes(self, step: int) -> bool:
        return True

    def stream(self, index: int) -> Cache:
        return self

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        return call.model_output


@dataclass(frozen=True)
class WatchedCall:
    """A call of the user's.

    Attributes:
        record: of its run.
        blanks: its placeholders; None where they tell too little.
        weights: fingerprint of the model's at that time, with adapters.
        in_memory: whether the record is, and not in files.
    """

    again: RepeatableCall
    record: Record
    blanks: list[Any] | None
    weights: str | None
    in_memory: bool

    def __len__(self) -> int:
        return len(self.record)

    @property
    def nbytes(self) -> int:
        """Of the recorded tensors."""
        return sum(t.nbytes for one in (self.record, *self.record.streams) for t in (*one.latents, *one.outputs))

    @property
    def bytes_in_memory(self) -> int:
        """Of those that do not lie in files."""
        return self.nbytes if self.in_memory else 0


class Joined(Sequence[Tensor]):
    """The tensors of several sequences as one batch each, made when it is read."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]):
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, step: Any) -> Any:
        return joined([part[step] for part in self.parts])


def joined_record(records: Sequence[Record]) -> Record:
    """The record of several calls on the same grid."""
    return replace(
        records[0],
        latents=Joined([record.latents for record in records]),
        outputs=Joined([record.outputs for record in records]),
        pixels=torch.empty(sum(map(len, records)), 0),
        uniform=all(record.uniform for record in records),
        streams=tuple(map(joined_record, zip(*(record.streams for record in records), strict=True))),
    )


@dataclass
class WatchedRuns(Runs):
    """The runs of several calls of the user's, made again side by side as they were.

    Attributes:
        parts: the calls.
        follower: of the pipeline.
        decode: whether results are decoded, to be compared in pixels.
        results: of the last time that they were made.
        references: decoded uncached results of each call.
    """

    parts: Sequence[WatchedCall] = field(kw_only=True)
    follower: Any = field(kw_only=True)
    decode: bool = field(kw_only=True)
    results: list[Any] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, follower: Any, parts: Sequence[WatchedCall], bar: Any, decode: bool) -> "WatchedRuns":
        """Those of some calls."""
        calls, record = [part.again for part in parts], joined_record([part.record for part in parts])
        plain = [call.plain() for call in calls]
        names = dict.fromkeys(name for one in plain for name in one)
        common = {n: plain[0][n] for n in names if all(n in one and _same(one[n], plain[0][n]) for one in plain)}
        return cls(
            follower.pipe,
            [prompt for call in calls for prompt in call.prompts()],
            [seed for call in calls for seed in call.seeds],
            common,
            1,
            bar,
            record,
            per_prompt={name: [] for name in names if name not in common},
            parts=parts,
            follower=follower,
            decode=decode,
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def first(self, count: int) -> "WatchedRuns":
        """The runs of the first calls, as many as `count` results need."""
        needed = next((i for i in range(1, len(self.parts)) if sum(map(len, self.parts[:i])) >= count), len(self.parts))
        return self._some(needed)

    def _some(self, calls: int) -> "WatchedRuns":
        made = WatchedRuns.of(self.follower, self.parts[:calls], self.bar, self.decode)
        made.references = self.references[:calls]
        return made

    def repeats(self) -> bool:
        """Whether the first two calls, side by side, give the same outputs: what a model keeps must not be mixed."""
        return self._some(2).same_again()

    def quality(self, cache: Cache) -> Tensor:
        self.latents(cache)
        return self.measured()

    def measured(self) -> Tensor:
        """PSNR (P,) in dB of the results that were made last."""
        made = zip(self._pixels(), self.references, strict=True)
        return torch.cat([psnr(found, reference).float() for found, reference in made])

    def _pixels(self) -> list[Tensor]:
        """Of the results that were made last, for each call."""
        made = zip(self.results, self.parts, strict=True)
        return [pixels_of(result, len(part)).detach().float().cpu() for result, part in made]

    def _results(self, cache: Cache, keep: Callable[[int, Tensor, int], None], output_type: str, **told: Any) -> Any:
        kind = "pt" if self.decode else "latent"
        bodies = [lambda p, c=part.again: self.follower.lent(lambda: c.again(p, kind)) for part in self.parts]
        blanks = [part.blanks or [] for part in self.parts]
        steps = Lockstep(cache, bodies, [0] * len(bodies), keep, blanks)
        with self.follower.lend(steps.begin, stepped=steps.stepped, check="step", **told):
            self.results = steps.run(self.pipe)
        return self.results

    def check(self) -> None:
        """Make the calls once more with all recorded outputs, and keep the decoded results; then try their first steps.

        Raises CalibrationError: they do not lead where they led; noise or arguments are others by now, or the model is.
        """
        final = self.latents(self._as_recorded())
        self.references = self._pixels() if self.decode else []
        last = self.record.latents[-1]
        if not float((final - last.float()).norm()) <= SAME[last.dtype] * float(last.float().norm()):
            raise CalibrationError("the same call leads to another result: it draws noise that cannot be repeated")
        with counted(self.pipe) as work:
            repeats = self.repeats()
        if not repeats:
            raise CalibrationError(
                "the same call gives another model output: the model changed, or keeps a state or draws noise that "
                "cannot be repeated"
            )
        self.every_step = shares(work, self.pipe, len(self._some(2)) * sum(self.record.branches[1:TRIED_STEPS]))

    def _as_recorded(self) -> Cache:
        every = range(self.record.num_steps)
        plain = Coefficients.of_outputs([[1.0]] * len(every))
        if not all(one.uniform for one in (self.record, *self.record.streams)):
            return Uncached()  # outputs are kept scaled
        fills = any(part.blanks is None for part in self.parts)
        made = Rerun(every, plain, self.record.outputs, fills=fills)
        made.streams = [Rerun(every, plain, stream.outputs) for stream in self.record.streams]
        return made


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other
