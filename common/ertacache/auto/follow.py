"""Follow a pipeline's runs and choose for each, at its first step, whether it is let be, watched or accelerated.

At the first step everything is known that makes a setting: the grid, the latents, how often the transformer was called.
Nothing is lost by waiting, since the first step is computed anyway.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ertacache.attach import Attachment, FiniteCheck, Run, transformers_of
from ertacache.auto.watch import Uncached, Watching
from ertacache.cache import Cache, Call, Coefficients
from ertacache.errors import StateError
from ertacache.intercept import Method, uncompiled
from ertacache.solver import StepCall


class Unchecked(FiniteCheck):
    """For runs that are the user's own: what they hold is left as it is."""

    def see(self, step: int, output: Tensor) -> None:
        pass


class Chosen(Cache):
    """Play what is chosen at the first step."""

    def __init__(self, choose: Callable[["Chosen", StepCall, Any], Cache]):
        super().__init__((), Coefficients.of_outputs([]))
        self.choose = choose
        self.chosen: Cache | None = None
        self.facts: Any = None  # what the owner says of the run before it begins

    def computes(self, step: int) -> bool:
        return self.chosen is None or self.chosen.computes(step)

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        if self.chosen is None:
            assert isinstance(call, StepCall)
            self.chosen = self.choose(self, call, scheduler)
        return self.chosen.output(step, call, scheduler)

    def end(self) -> None:
        if self.chosen is not None:
            self.chosen.end()

    @property
    def own(self) -> bool:
        """Whether the run is the user's own so far: nothing was reused or combined."""
        return self.chosen is None or isinstance(self.chosen, (Uncached, Watching))


class Follower(Attachment):
    """An attachment for good, which sees whole calls and never refuses a run that it has not accelerated.

    Args:
        owner: `in_call()` says whether this thread is in a call of the pipeline; `around` makes it; `facts` are what is
            to be read before a run, and `choose` gives its cache; `not_followed` is told why a run goes uncached,
            `completed` which ones came to their end.
    """

    def __init__(self, pipe: Any, owner: Any):
        super().__init__(pipe, self._begin, stepped=self._stepped)
        self.owner = owner
        self.lent = False

    def around(self, pipe: Any, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Make a call of the pipeline."""
        return self.owner.around(pipe, call, args, kwargs)

    @contextmanager
    def lend(self, begin: Callable[[Any], Cache], **options: Any) -> Iterator[Attachment]:
        """Be an ordinary attachment for the length of a block, in which no other call is under way."""
        own = {name: getattr(self, name) for name in ("begin", "stepped", "call", "check", "structure", "lent")}
        vars(self).update(begin=begin, lent=True, **options)
        try:
            yield self
        finally:
            self.finish()
            vars(self).update(own)

    def replaced(self) -> bool:
        """Whether the pipeline has other parts by now than those that this is attached to."""
        present = {name: uncompiled(part) for name, part in transformers_of(self.pipe).items()}
        attached = {name: uncompiled(one.module) for name, one in self.interceptions.items()}
        return self.pipe.scheduler is not self.scheduler or present != attached

    def run(self) -> Run | None:
        """This thread's run."""
        return self.runs.get(threading.get_ident())

    def _begin(self, scheduler: Any) -> Cache:
        cache = Chosen(self._choose)
        cache.facts = self.owner.facts(scheduler)
        return cache

    def _choose(self, cache: Chosen, call: StepCall, scheduler: Any) -> Cache:
        run = self.runs[threading.get_ident()]
        chosen = self.owner.choose(run, cache.facts, call, scheduler)
        if isinstance(chosen, (Uncached, Watching)):
            run.finite = Unchecked()
        return chosen

    def _stepped(self, step: int, latents: Tensor) -> None:
        run = self.run()
        chosen = run.cache.chosen if run is not None and isinstance(run.cache, Chosen) else None
        if isinstance(chosen, Watching):
            chosen.stepped(step, latents)

    def _check_scheduler(self) -> None:
        """Nothing to refuse: the next call attaches to another scheduler."""

    def _set_timesteps(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.lent or not self.interceptions or self.owner.in_call():
            return super()._set_timesteps(method, args, kwargs)
        self.finish()
        self.owner.not_followed("another pipeline made it, of the same parts or a copy: enable that one")
        return method.original(*args, **kwargs)

    def _step(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.lent:
            return super()._step(method, args, kwargs)
        run = self.run()
        if run is None or run.scheduler is not method.scheduler:
            return method.original(*args, **kwargs)
        assert isinstance(run.cache, Chosen)
        if run.cache.own:
            try:
                run.check(self.signature.call(args, kwargs))
            except (StateError, TypeError) as error:
                self.finish()
                self.owner.not_followed(str(error))
                return method.original(*args, **kwargs)
        result = super()._step(method, args, kwargs)
        if run.step == len(run.timesteps):
            self.owner.completed(run)
        return result
