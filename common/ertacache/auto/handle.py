"""Accelerate a pipeline without calibrating it first: watch its first results, fit to them, remember the fit."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ertacache import checks, provenance, solver
from ertacache.api import check_parts_of, remove
from ertacache.attach import Attachment, Run, networks_of
from ertacache.auto.fitting import EFFORTS, Fitter, Gate
from ertacache.auto.follow import Follower, played
from ertacache.auto.setting import Goal, Setting, facts_and_weights, grid_facts
from ertacache.auto.state import Call, Facts, Known, Options, SettingStatus, Status
from ertacache.auto.store import Store
from ertacache.auto.watch import (
    CALLBACK,
    CALLBACKS,
    RepeatableCall,
    SeenCallback,
    Uncached,
    WatchedCall,
    Watching,
)
from ertacache.cache import Cache
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError, EnableWarning, MismatchError
from ertacache.fit.runs import blanks_of_one
from ertacache.replay import cache_of

SAMPLES = 4
MEMORY_LIMIT = 2 * 2**30  # bytes of trajectories in memory; the calls above it go to files
KEPT_LIMIT = 8 * 2**30  # bytes of all trajectories, in memory and files; the setting used longest ago loses its own


def enable(
    pipe: Any,
    *,
    speedup: float | None = None,
    computed_steps: int | None = None,
    min_psnr: float | None = None,
    samples: int = SAMPLES,
    effort: str = "fast",
    strict: bool = False,
    audit_every: int | None = None,
    retry: bool = True,
    memory_limit: int = MEMORY_LIMIT,
    store: str | Path | None = None,
    progress: bool = True,
) -> "Enabled":
    """Accelerate a pipeline from its fifth result on, and at once where a process before has calibrated it.

    The first results at each setting (model, weights, scheduler, noise grid, guidance on or off, dtype) are made
    without the cache and watched. Then the cache is calibrated on these calls, made again with the same noise, and
    every later run at that setting is accelerated. No run is refused.

    Args:
        pipe: a diffusers pipeline with a transformer and a scheduler.
        speedup: N / K; 2 unless another goal is given.
        computed_steps: K itself.
        min_psnr: dB to the uncached result; takes the effort of a prediction, "balanced".
        samples: results to watch at each setting; a batch of 4 is 4.
        effort: of the fit, "fast" or "balanced": about 2 or 6 uncached runs for 4 samples at 2x, once for a setting.
            "balanced" predicts the quality.
        strict: guidance scale, shape of the latents and adapters (LoRA) make settings of their own. Otherwise a run
            that differs in these only warns.
        audit_every: make every n-th accelerated result both ways and compare; you get the uncached one.
        retry: after a fit that failed, try again at the next calls, three times; otherwise stay uncached.
        memory_limit: bytes of recorded trajectories that stay in host memory; calls above it go to files in the
            system's temporary folder.
        store: folder of the calibrations; `ERTACACHE_HOME` or the platform's cache folder by default.
        progress: say what a call waits for, and show a bar.

    Returns:
        The handle. Replaces what was attached to the pipeline before.

    Raises:
        CalibrationError: an argument has an impossible value.
        MismatchError: this is not a pipeline with a transformer and a scheduler.
        StateError: its transformer or its scheduler is attached as part of another pipeline, or other processes take
            part in its forward.
    """
    effort = "balanced" if min_psnr is not None else effort
    if effort not in EFFORTS:
        raise CalibrationError(f"effort is {effort!r}: enable takes {' or '.join(EFFORTS)}; for more use calibrate")
    for name, value in (("samples", samples), ("audit_every", audit_every), ("memory_limit", memory_limit)):
        lowest = 0 if name == "memory_limit" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
            raise CalibrationError(f"{name} is {value!r}: it must be a whole number from {lowest}")
    check_parts_of(pipe)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from ertacache.official.ranks import check_alone  # one process is the rule

        check_alone(networks_of(pipe).values())
    goal = Goal.of(speedup=speedup, computed_steps=computed_steps, min_psnr=min_psnr)
    remove(pipe)
    options = Options(samples, effort, strict, audit_every, retry, memory_limit, progress)
    return Enabled(pipe, goal, options, Store(store))


class Enabled:
    """What `enable` returns. As a context manager it disables at the end.

    Attributes:
        pipe: what it is attached to.
    """

    def __init__(self, pipe: Any, goal: Goal, options: Options, store: Store):
        self.pipe, self.options, self.store = pipe, options, store
        self._goal = goal
        self._known: dict[str, Known] = {}  # by the setting's key, the last used at the end
        self._local = threading.local()
        self._gate = Gate()
        self._fitter = Fitter(pipe, options, store, self._gate)
        self._follower = Follower(pipe, self)
        self._follower.attach()
        self._closed, self._replaced = False, None  # as for `api.Applied`

    @property
    def _attachment(self) -> Follower:
        return self._follower

    def _leave(self) -> None:
        """Leave nothing behind: no roll of processes is kept here."""

    # -- what a user calls -------------------------------------------------------------------------------

    def disable(self) -> None:
        """Leave the pipeline as it was before `enable`, and forget what was watched."""
        if self._follower.interceptions:
            remove(self.pipe)
        self._closed = True
        self._known.clear()

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def status(self) -> Status:
        """Where each setting stands; print it."""
        return Status(self._status(known) for known in reversed(self._known.values()))

    def _status(self, k: Known) -> SettingStatus:
        made = k.calibration(self._goal)
        refused = None if made else k.refused
        return SettingStatus(
            str(k.setting), k.samples, self.options.samples, made, k.accelerated, k.saved_calls, [*k.audits], refused
        )

    @property
    def speedup(self) -> float | None:
        """The goal of the runs to come, if it is a speed-up; 1 leaves them uncached. Set it to change it.

        Another speed-up is fitted to the same watched results while they are in memory.
        """
        return self._goal.value if self._goal.name == "speedup" else None

    @speedup.setter
    def speedup(self, value: float) -> None:
        self._goal = Goal.of(speedup=value)
        for known in self._known.values():
            known.refused, known.failures = None, 0

    @contextmanager
    def using(
        self, *, speedup: float | None = None, computed_steps: int | None = None, min_psnr: float | None = None
    ) -> Iterator["Enabled"]:
        """Another goal for the calls that this thread makes in the block; speedup=1 leaves them uncached."""
        before = getattr(self._local, "goal", None)
        self._local.goal = Goal.of(speedup=speedup, computed_steps=computed_steps, min_psnr=min_psnr)
        try:
            yield self
        finally:
            self._local.goal = before

    # -- a call ------------------------------------------------------------------------------------------

    def in_call(self) -> bool:
        """Whether this thread is in a call of the pipeline."""
        return getattr(self._local, "call", None) is not None

    @contextmanager
    def around(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Attachment]:
        """Frame a call of the pipeline, whose keyword arguments may be changed; fit afterwards if enough was seen."""
        goal = getattr(self._local, "goal", None) or self._goal
        self._follow_replaced()
        self._fit_if_due(goal)
        self._gate.enter()
        try:
            current = self._local.call = self._current(pipe, goal, args, kwargs)
            if current.callback is not None:
                kwargs[CALLBACK] = current.callback
            yield self._follower
        finally:
            self._local.call = None
            self._gate.leave()
        self._count(current)
        watched, known = self._watched(current), current.known
        if watched is not None and known is not None and current.audited:
            self._fitter.audit(self._follower, known, goal, watched)
        elif watched is not None and known is not None:
            known.watched.append(watched)
            self._forget_some(known)
            self._fit_if_due(goal)

    def _current(self, pipe: Any, goal: Goal, args: tuple, kwargs: dict[str, Any]) -> Call:
        try:
            again = RepeatableCall(pipe, args, kwargs)
        except (CalibrationError, TypeError, RuntimeError):  # wrong arguments, which the call itself will refuse
            return Call(pipe, goal, None, None, True)
        given = kwargs.get(CALLBACK)
        seen = None
        if given is not None and callable(given) and not hasattr(given, "tensor_inputs"):  # diffusers looks for those
            seen = SeenCallback(given, self._is_watching)
        unseen = any(
            name.startswith(CALLBACKS) and callable(value) and not (seen and value is given)
            for name, value in again.arguments.items()
        )
        return Call(pipe, goal, again, seen, unseen)

    def _is_watching(self) -> bool:
        return self.in_call() and self._local.call.watching is not None

    def _follow_replaced(self) -> None:
        """Attach to parts of the pipeline that were replaced, unless a call is under way."""
        with self._gate.waited() as idle:
            if idle and self._follower.replaced():
                self._follower.detach()
                self._follower = Follower(self.pipe, self)
                self._follower.attach()

    def _fit_if_due(self, goal: Goal) -> None:
        """Fit for the setting that was used last."""
        self._fitter.fit_if_due(self._follower, next(reversed(self._known.values()), None), goal)

    # -- a run -------------------------------------------------------------------------------------------

    def facts(self, scheduler: Any) -> Facts | None:
        """What is to be read of a run before it begins; None where it is let be."""
        current: Call = self._local.call
        if current.goal == Goal("speedup", 1.0):
            return None
        try:
            checks.check_no_other_cache(current.pipe)
            found, weights = facts_and_weights(current.pipe, scheduler)
        except Exception as error:  # whatever it is: the run is the user's
            self.not_followed(f"{type(error).__name__}: {error}")
            return None
        if self.options.strict:
            given = provenance.arguments_of(*self._follower.caller).items()
            scales = {name: value for name, (value, _) in given if "guidance" in name or "cfg" in name}
            found |= {"guidance": [getattr(current.pipe, "guidance_scale", None), scales], "adapted": weights}
        current.weights = weights
        return Facts(found, scheduler, solver.host_grid(scheduler))

    def choose(self, run: Run, facts: Facts | None, latents: Tensor, first: int) -> Cache:
        """The cache of a run, at its first step."""
        current: Call = self._local.call
        current.runs.append(run)
        current.watching = None
        if facts is None:
            return Uncached()
        try:
            current.calls, current.first = run.calls, first
            current.blanks = None if run.cache.fills else blanks_of_one(run.blanks, 1)  # type: ignore[attr-defined]
            return self._chosen(current, run, facts, latents)
        except Exception as error:  # whatever it is: the run is the user's
            self.not_followed(f"{type(error).__name__}: {error}")
            return Uncached()

    def _chosen(self, current: Call, run: Run, facts: Facts, latents: Tensor) -> Cache:
        goal, audit_every = current.goal, self.options.audit_every
        known = current.known = self._known_of(current, run, facts, latents)
        calibration = known.calibration(goal) or self._fitter.stored(known, goal, current.pipe)
        if calibration is not None:
            known.turns += 1
            due = audit_every is not None and known.turns % audit_every == 0
            if due and self._may_watch(current) and current.again is not None and current.again.decodes:
                current.audited = True
                return self._watch(current, facts, latents)
            return self._accelerated(current, calibration, facts, latents).begin(facts.scheduler)
        if known.refused is not None or known.samples >= self.options.samples or not self._may_watch(current):
            return Uncached()
        return self._watch(current, facts, latents)

    def _known_of(self, current: Call, run: Run, facts: Facts, latents: Tensor) -> Known:
        shape, (timesteps, sigmas) = list(latents.shape[1:]), facts.grid
        beside = {"latents": shape} if self.options.strict else {}
        found = {**facts.found, **grid_facts(timesteps[current.first :], sigmas[current.first :]), **beside}
        branches = run.samples / max(1, len(latents))
        setting = Setting({**found, "branches": branches, "streams": len(run.grids)}, f", latents {shape}")
        known = self._known.pop(setting.key, None) or Known(setting)
        self._known[setting.key] = known  # the last used at the end
        return known

    def _may_watch(self, current: Call) -> bool:
        ours = current.pipe.transformer is self.pipe.transformer  # which the fit will call
        return ours and current.again is not None and not current.unseen_callback and len(current.runs) == 1

    def _watch(self, current: Call, facts: Facts, latents: Tensor) -> Cache:
        assert current.again is not None
        current.again.keep()
        taken = sum(part.bytes_in_memory for known in self._known.values() for part in known.watched)
        current.watching = Watching(max(0, self.options.memory_limit - taken))
        current.watching.begin(facts.scheduler)
        current.watching.timesteps, current.watching.sigmas = facts.grid  # which a pipeline may have changed since
        current.watching.started(latents, current.first, 0)
        current.watching.guided(0, current.runs[0].samples / max(1, len(latents)))
        return current.watching

    def _accelerated(self, current: Call, calibration: Calibration, facts: Facts, latents: Tensor) -> Cache:
        known, caller = current.known, self._follower.caller
        assert known is not None
        checks.check_first(calibration, current.first, checks.check_grid(calibration, *facts.grid))
        checks.check_arguments(calibration, current.pipe, provenance.arguments_of(*caller))
        checks.check_latents(calibration, latents.shape[1:])
        if current.weights != calibration.model.get("weights_fingerprint") and current.weights not in known.warned_of:
            known.warned_of.add(current.weights)
            checks.check_weights(calibration, current.pipe.transformer)
        current.playing = calibration
        return cache_of(calibration)

    def guided(self, step: int, branches: float) -> bool:
        """Whether an accelerated run goes on uncached, since its guidance changes as the calibrated one did not."""
        current: Call = self._local.call
        assert current.playing is not None
        try:
            checks.check_branches(current.playing, step, branches)
        except MismatchError as error:
            warnings.warn(f"this run goes on uncached from step {step}: {error}", EnableWarning, stacklevel=3)
            return True
        return False

    def _count(self, current: Call) -> None:
        """Count the accelerated runs of a call that has ended."""
        for run in current.runs:
            cache = played(run)
            if current.known is not None and cache is not None and self._whole(current, run):
                current.known.accelerated += 1
                current.known.saved_calls += (run.step - len(cache.schedule)) * current.calls

    def _whole(self, current: Call, run: Run) -> bool:
        """Whether a run made all steps that it was to make; some pipelines leave the end of the grid out."""
        left = len(run.grids[0][1]) - current.first - run.step
        stopped = getattr(current.pipe, "_interrupt", False) or current.callback is not None or current.unseen_callback
        return run.step > 0 and (left == 0 or not stopped)

    def not_followed(self, why: str) -> None:
        """Say why a run goes uncached."""
        warnings.warn(f"this run goes uncached: {why}", EnableWarning, stacklevel=3)

    def _watched(self, current: Call) -> WatchedCall | None:
        """What was watched in a call that has ended."""
        watching, known, runs = current.watching, current.known, current.runs
        if len(runs) > 1 and known is not None and known.calibration(current.goal) is None:
            self.not_followed("its call makes several runs, and is not watched")
        if watching is None or known is None or len(runs) != 1 or not self._whole(current, runs[0]):
            return None
        assert current.again is not None
        try:
            if current.callback is not None and current.callback.changed:
                raise CalibrationError("its callback changes the run, so the call alone does not say what it does")
            watching.check()
            record = watching.record(torch.empty(0))
            return WatchedCall(current.again, record, current.blanks, current.weights, watching.store.in_memory)
        except Exception as error:
            warnings.warn(f"this run was not watched: {error}", EnableWarning, stacklevel=3)
            return None

    def _forget_some(self, known: Known) -> None:
        """Drop what was watched at the settings used longest ago, until the rest is within the limit."""
        others = [other for other in self._known.values() if other is not known and other.watched]
        while others and sum(k.nbytes for k in (*others, known)) > KEPT_LIMIT:
            others.pop(0).watched.clear()
