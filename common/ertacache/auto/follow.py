"""Follow a pipeline's runs and choose for each, at its first step, whether it is let be, watched or accelerated.

At the first step everything is known that makes a setting: the grid, where in it the run starts, the latents, how often
the transformer was called. Nothing is lost by waiting, since the first step is computed anyway.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ertacache.attach import Attachment, FiniteCheck, Run, networks_of, schedulers_of
from ertacache.auto.watch import Uncached, Watching
from ertacache.cache import Cache
from ertacache.errors import StateError
from ertacache.fit.runs import is_plain
from ertacache.intercept import Interception, Method, uncompiled
from ertacache.replay import Chosen


class Unchecked(FiniteCheck):
    """For runs that are the user's own: what they hold is left as it is."""

    def see(self, step: int, output: Tensor) -> None:
        pass


def played(run: Run) -> Cache | None:
    """What accelerates a run; None for one that is the user's own so far: nothing was reused or combined."""
    chosen = run.cache.chosen if isinstance(run.cache, Chosen) else None
    return None if isinstance(chosen, (Uncached, Watching)) else chosen


class Follower(Attachment):
    """An attachment for good, which sees whole calls and never refuses a run that it has not accelerated.

    Args:
        owner: `in_call()` says whether this thread is in a call of the pipeline, which `around` frames; `facts` are
            what is to be read before a run, and `choose` gives its cache; `guided` may give another one in its course;
            `not_followed` is told why a run goes uncached.
    """

    def __init__(self, pipe: Any, owner: Any):
        super().__init__(pipe, self._begin, started=self._started, stepped=self._stepped, guided=self._guided)
        self.call = self._called
        self.owner = self.handle = owner
        self._local = threading.local()

    @contextmanager
    def call_of(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        if self._lent or self.owner.in_call():
            with super().call_of(pipe, args, kwargs):
                yield
            return
        # its parts may be followed anew by then, and the arguments wrapped
        with self.owner.around(pipe, args, kwargs) as present, Attachment.call_of(present, pipe, args, kwargs):
            yield

    @contextmanager
    def lend(self, begin: Callable[[Any], Cache], **options: Any) -> Iterator[Attachment]:
        """Be an ordinary attachment in a block, for the calls that `lent` makes; no other one may be under way."""
        changed = {"started": None, "guided": None, "call": None, **options, "begin": begin}
        own = {name: getattr(self, name) for name in (*changed, "blanks")}
        vars(self).update(changed)
        try:
            yield self
        finally:
            vars(self).update(own)

    def lent(self, function: Callable[[], Any]) -> Any:
        """Make a call, in a thread of its own, for whom this is lent to."""
        self._local.lent = True
        return function()

    @property
    def _lent(self) -> bool:
        return getattr(self._local, "lent", False)

    def replaced(self) -> bool:
        """Whether the pipeline has other parts by now than those that this is attached to."""
        present = {name: uncompiled(part) for name, part in networks_of(self.pipe).items()}
        attached = {name: uncompiled(one.module) for name, one in self.interceptions.items()}
        schedulers = [id(method.scheduler) for method in self.methods if method.name == "step"]
        return present != attached or schedulers != [id(one) for one in schedulers_of(self.pipe)]

    def finish(self) -> None:
        super().finish()
        if not self._lent:
            self.blanks = []  # the next run may have others

    def run(self) -> Run | None:
        """This thread's run."""
        return self.runs.get(threading.get_ident())

    def _called(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        run = self.run()
        if run is not None and run.step == 0:
            run.cache.fills = run.cache.fills or not all(map(is_plain, (*args, *kwargs.values())))  # type: ignore[attr-defined]
        return interception.run(*args, **kwargs)

    def _begin(self, scheduler: Any) -> Cache:
        return Chosen(self.owner.facts(scheduler))

    def _started(self, latents: Tensor, first: int, stream: int) -> None:
        run = self.run()
        assert run is not None and isinstance(run.cache, Chosen)
        if stream == 0:
            run.cache.chosen = self.owner.choose(run, run.cache.facts, latents, first)
            if played(run) is None:
                run.finite = Unchecked()
        elif isinstance(run.cache.chosen, Watching):
            run.cache.chosen.started(latents, first, stream)

    def _guided(self, step: int, branches: float) -> None:
        run = self.run()
        assert run is not None and isinstance(run.cache, Chosen)
        if isinstance(run.cache.chosen, Watching):
            run.cache.chosen.guided(step, branches)
        elif played(run) is not None and self.owner.guided(step, branches):
            run.cache.chosen = Uncached()  # from here on
            for stream in run.streams.values():
                stream.cache = run.cache.chosen

    def _stepped(self, step: int, latents: Tensor, stream: int) -> None:
        run = self.run()
        chosen = getattr(run.cache, "chosen", None) if run is not None else None
        if isinstance(chosen, Watching):
            chosen.stepped(step, latents, stream)

    def _check_scheduler(self) -> None:
        """Nothing to refuse: the next call attaches to another scheduler."""

    def _set_timesteps(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._lent or not self.interceptions or self.owner.in_call():
            return super()._set_timesteps(method, args, kwargs)
        self.finish()
        self.owner.not_followed("another pipeline made it, of the same parts or a copy: enable that one")
        return method.original(*args, **kwargs)

    def _step(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        run = self.run()
        if self._lent:
            return super()._step(method, args, kwargs)
        if run is None:
            return method.original(*args, **kwargs)
        accelerated = played(run) is not None
        try:
            return super()._step(method, args, kwargs)
        except StateError as error:
            if accelerated:
                raise
            self.finish()
            self.owner.not_followed(str(error))
            return method.original(*args, **kwargs)
