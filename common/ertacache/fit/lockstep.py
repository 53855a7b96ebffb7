"""Run several prompts side by side, each in a call of its own, so that what cannot be a batch is fitted together.

Each prompt has a thread, a copy of the pipeline, and schedulers of its own, as a server gives to each request. One
thread runs at a time. At every step of a scheduler it waits for the others; the cache then sees all prompts as one
batch. The global random generators are each prompt's own, so what is drawn from them is what it would draw alone.
"""

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache.attach import schedulers_of
from ertacache.cache import Cache
from ertacache.errors import StateError
from ertacache.solver import StepCall, affine_step, is_affine

Body = Callable[[], Any]


class GivenUpError(BaseException):
    """Ends the threads of the other prompts where one failed."""


@contextlib.contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Seed the global random generators, and put them back at the end."""
    state = generator_state()
    seed = (seed + 1) * 0x9E3779B1 % 2**63  # the initial noise is drawn from the seed itself
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        restore(state)


def generator_state() -> tuple[Any, ...]:
    """Of the global random generators: torch's on the CPU and on all CUDA devices, Python's and numpy's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def restore(state: tuple[Any, ...]) -> None:
    """Put the global random generators into a state."""
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)


class Turns:
    """Let threads run one at a time, each until it meets the others.

    Args:
        bodies: what the threads do; they call `meet` equally often.
        together: makes of what all bring to a meeting what each gets.
        seeds: of each thread's global random generators.
    """

    def __init__(self, bodies: Sequence[Body], together: Callable[[list[Any]], list[Any]], seeds: Sequence[int]):
        self.bodies, self.together, self.seeds = bodies, together, seeds
        self.turn, self.changed = 0, threading.Condition()
        self.failure: BaseException | None = None
        self.places: dict[int, int] = {}  # by thread
        self.over: set[int] = set()
        self.brought: list[Any] = [None] * len(bodies)
        self.got: list[Any] = []
        self.results: list[Any] = [None] * len(bodies)

    def run(self) -> list[Any]:
        """What the bodies return; raises what the first of them raises that fails."""
        self.modes = torch.is_inference_mode_enabled(), _autocasts()
        threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(len(self.bodies))]
        state = generator_state()
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interruption, which reaches the main thread alone
            self._fail(error)
            for thread in threads:
                thread.join()
        finally:
            restore(state)
        failure, self.failure = self.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # no circle keeps what the threads held
        return self.results

    @property
    def place(self) -> int:
        """Of this thread."""
        return self.places[threading.get_ident()]

    def meet(self, item: Any) -> Any:
        """Wait until all have brought an item, and return what `together` made of them for this thread."""
        place = self.place
        if self.over:
            raise StateError("the prompts' runs differ in their number of steps: calibrate with prompts of one kind")
        self.brought[place] = item
        if place == len(self.bodies) - 1:
            self.got = self.together(self.brought)
        state = generator_state()
        self._pass_on(place)
        self._wait(place)
        restore(state)
        return self.got[place]

    def _work(self, place: int) -> None:
        self.places[threading.get_ident()] = place
        inference, autocasts = self.modes
        try:
            self._wait(place)
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode(inference))
                stack.enter_context(torch.no_grad())
                for autocast in autocasts:
                    stack.enter_context(autocast)
                stack.enter_context(own_generators(self.seeds[place]))
                self.results[place] = self.bodies[place]()
            self.over.add(place)
            self._pass_on(place)
        except GivenUpError:
            pass
        except BaseException as error:
            self._fail(error)

    def _wait(self, place: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self.turn == place)
        if self.failure is not None:
            raise GivenUpError

    def _pass_on(self, place: int) -> None:
        with self.changed:
            self.turn = (place + 1) % len(self.bodies)
            if self.turn in self.over and len(self.over) < len(self.bodies) and place not in self.over:
                raise StateError(
                    "the prompts' runs differ in their number of steps: calibrate with prompts of one kind"
                )
            self.changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()


def _autocasts() -> list[Any]:
    kinds = [kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)]
    return [torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)) for kind in kinds]


@dataclass(frozen=True)
class Part:
    """One prompt's call of its scheduler's step, in the state that the global generators have there."""

    scheduler: Any
    call: StepCall
    state: tuple[Any, ...]

    def asked(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function says of this call, with the global generators as they are for it."""
        state = generator_state()
        restore(self.state)
        try:
            return function(self.scheduler, self.call, *args)
        finally:
            restore(state)


def joined(batches: Sequence[Tensor]) -> Tensor:
    """One batch of several: flat where their shapes differ, filled up with zeros, which add nothing to any sum."""
    if len({batch.shape[1:] for batch in batches}) == 1:
        return torch.cat(list(batches))
    flat = [batch.flatten(1) for batch in batches]
    width = max(batch.shape[1] for batch in flat)
    return torch.cat([torch.nn.functional.pad(batch, (0, width - batch.shape[1])) for batch in flat])


def parted(batch: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `joined` made one batch of, in the shapes of these."""
    pieces = zip(batch.split([len(one) for one in like]), like, strict=True)
    return [p if p.shape == one.shape else p[:, : one[0].numel()].reshape(one.shape) for p, one in pieces]


class JointCall:
    """The calls of all prompts as one; the batch of each is a piece of it."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.samples = [part.call.sample for part in parts]
        self.model_output = joined([part.call.model_output for part in parts])
        self.sample = joined(self.samples)

    def affine(self) -> tuple[Tensor, Any]:
        """F and c of all; see `solver.affine_step`."""
        offsets, gains = zip(*(part.asked(affine_step) for part in self.parts), strict=True)
        offset = joined(offsets)
        if not any(isinstance(gain, Tensor) for gain in gains) and np.ptp(gains) <= 1e-4 * abs(np.mean(gains)):
            return offset, float(np.mean(gains))
        whole = [torch.as_tensor(g).to(o).expand_as(o) for g, o in zip(gains, offsets, strict=True)]
        return offset, joined(whole)

    def is_affine(self, offset: Tensor, gain: Any) -> bool:
        """Whether each is F + c o; see `solver.is_affine`."""
        gains = parted(gain, self.samples) if isinstance(gain, Tensor) else [gain] * len(self.parts)
        offsets = parted(offset, self.samples)
        return all(p.asked(is_affine, o, g) for p, o, g in zip(self.parts, offsets, gains, strict=True))


class Seat(Cache):
    """One prompt's side of a cache that all of them share, with placeholders of its own."""

    def __init__(self, shared: Cache, meet: Callable[[Any], Any], index: int = 0, blanks: Sequence[Any] = ()):
        self.shared, self.meet, self.index, self.blanks = shared, meet, index, blanks

    def computes(self, step: int) -> bool:
        return self.shared.computes(step)

    def stream(self, index: int) -> Cache:
        self.shared.stream(index)  # may refuse
        return Seat(self.shared, self.meet, index) if index else self

    def output(self, step: int, call: Any, scheduler: Any = None) -> Tensor:
        return self.meet((step, self.index, Part(scheduler, call, generator_state())))

    def end(self) -> None:
        """Nothing: the shared cache ends when all have."""


class Lockstep:
    """Runs of a pipeline under one cache, each by a call of its own.

    Args:
        shared: the cache.
        bodies: from a copy of the pipeline with schedulers of its own to what its call returns.
        seeds: of the global random generators in each call.
        stepped: told each step, the latents of all after it, and the stream's index.
        blanks: placeholders of each call, where they differ.
    """

    def __init__(
        self,
        shared: Cache,
        bodies: Sequence[Callable[[Any], Any]],
        seeds: Sequence[int],
        stepped: Callable[[int, Tensor, int], None],
        blanks: Sequence[Sequence[Any]] = (),
    ):
        self.shared, self.bodies, self.seeds, self.told = shared, bodies, seeds, stepped
        self.blanks = blanks or [()] * len(bodies)
        self.begun = False
        self.after: list[Tensor] = []

    def run(self, pipe: Any) -> list[Any]:
        """What the calls return, for a pipeline that is attached to with `begin` and `stepped`."""
        calls = [partial(self._call, body, pipe) for body in self.bodies]
        self.turns = Turns(calls, self._together, self.seeds)
        try:
            return self.turns.run()
        finally:
            self.shared.end()

    def _call(self, body: Callable[[Any], Any], pipe: Any) -> Any:
        return body(own_copy(pipe))

    def begin(self, scheduler: Any) -> Cache:
        """The seat of the thread whose run begins."""
        if not self.begun:
            self.shared, self.begun = self.shared.begin(scheduler), True
        return Seat(self.shared, self.turns.meet, blanks=self.blanks[self.turns.place])

    def stepped(self, step: int, latents: Tensor, stream: int) -> None:
        """Gather the latents of all."""
        self.after.append(latents)
        if len(self.after) == len(self.bodies):
            latents, self.after = joined(self.after), []
            self.told(step, latents, stream)

    def _together(self, brought: list[tuple[int, int, Part]]) -> list[Tensor]:
        if len({(step, index) for step, index, _ in brought}) > 1:
            raise StateError("the prompts' runs are at different steps: calibrate with prompts of one kind")
        step, index, _ = brought[0]
        joint = JointCall([part for *_, part in brought])
        output = self.shared.stream(index).output(step, joint)
        return parted(output, [part.call.model_output for part in joint.parts])


def own_copy(pipe: Any) -> Any:
    """A copy of a pipeline that shares its models, with schedulers of its own."""
    made = copy.copy(pipe)
    for name, part in vars(pipe).items():
        if any(part is scheduler for scheduler in schedulers_of(pipe)):
            made.__dict__[name] = copy.deepcopy(part)
    return made
