"""Fit to what was watched, once for a setting and while no other call runs; audit what was fitted."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ertacache import provenance
from ertacache.attach import Attachment
from ertacache.auto.setting import KEY, Goal, facts_and_weights, fits
from ertacache.auto.state import Known, Options, promise
from ertacache.auto.store import Store
from ertacache.auto.watch import WatchedCall, WatchedRuns
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError, EnableWarning, ERTACacheError
from ertacache.fit.cost import most_evaluations
from ertacache.fit.recipe import calibrate_runs
from ertacache.fit.runs import quiet
from ertacache.replay import cache_of

EFFORTS = ("fast", "balanced")
ATTEMPTS = 3  # fits that may fail at a setting before it stays uncached
DRAIN_SECONDS = 600.0  # that a fit waits for the calls of other threads, before it leaves it to a later call
AUDITS = 4  # whose mean is held against what was promised
AUDIT_MARGIN = 3.0  # dB


class Gate:
    """Lets calls of a pipeline run side by side, and one thread be alone with it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._active = 0  # calls under way
        self._taken = False

    @contextmanager
    def waited(self) -> Iterator[bool]:
        """Wait for who is alone and hold off others; gives whether no call is under way."""
        with self._condition:
            self._condition.wait_for(lambda: not self._taken)
            yield not self._active

    def enter(self) -> None:
        """Begin a call, once nobody is alone."""
        with self.waited():
            self._active += 1

    def leave(self) -> None:
        """End a call."""
        with self._condition:
            self._active -= 1
            self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold off new calls, and wait for those under way in other threads; False where another thread does so."""
        with self._condition:
            mine, self._taken = not self._taken, True
        try:
            with self._condition:
                alone = mine and self._condition.wait_for(lambda: not self._active, DRAIN_SECONDS)
            yield alone
        finally:
            if mine:
                with self._condition:
                    self._taken = False
                    self._condition.notify_all()


class Fitter:
    """Makes the calibrations of an enabled pipeline, or finds them in the store."""

    def __init__(self, pipe: Any, options: Options, store: Store, gate: Gate):
        self.pipe, self.options, self.store, self.gate = pipe, options, store, gate

    def stored(self, known: Known, goal: Goal, pipe: Any) -> Calibration | None:
        """The calibration that another process or an earlier one has left, if it is for this setting."""
        wanted = EFFORTS.index(self.options.effort)

        def good(found: Calibration) -> bool:
            effort = found.settings.get("effort")
            enough = effort not in EFFORTS or EFFORTS.index(effort) >= wanted
            return enough and fits(found, known.setting, goal, pipe)

        found = self.store.find(known.setting.name(goal), good)
        if found is not None:
            known.calibrations[goal.label(known.setting.num_steps)] = found
        return found

    def fit_if_due(self, follower: Attachment, known: Known | None, goal: Goal) -> None:
        """Fit for a setting, if enough of it was watched and nobody did it."""
        if known is None or goal == Goal("speedup", 1.0):
            return
        if known.calibration(goal) is not None:
            self._save_if_due(known, goal)
            return
        attempts = ATTEMPTS if self.options.retry else 1
        if known.samples < self.options.samples or known.refused is not None or known.failures >= attempts:
            return
        if not follower.interceptions:
            return
        with self.gate.alone() as alone:
            if alone and self._is_as_watched(known):
                self._fit(follower, known, goal)

    def _is_as_watched(self, known: Known) -> bool:
        """Whether the pipeline has the scheduler and the weights that its watched runs had; forget runs of others."""
        present, weights = facts_and_weights(self.pipe, self.pipe.scheduler)
        known.watched = [part for part in known.watched if part.weights == weights]
        same = all(value == known.setting.facts[name] for name, value in present.items())
        return same and known.samples >= self.options.samples

    def _fit(self, follower: Attachment, known: Known, goal: Goal) -> None:
        with self.store.lock(known.setting.name(goal)) as mine:
            # where another process fits the same, this one goes on uncached until that is done
            if not mine or self.stored(known, goal, self.pipe) is not None:
                return
            try:
                made = self._fitted(follower, known, goal)
            except ERTACacheError as error:  # it will not go better the next time
                known.refused = str(error)
                warnings.warn(f"{known.setting} stays uncached: {error}", EnableWarning, stacklevel=3)
                return
            except BaseException as error:
                known.failures += 1
                if not isinstance(error, Exception):
                    raise
                then = "the next call tries again" if self.options.retry else "it stays uncached"
                said = f"calibrating for {known.setting} failed ({type(error).__name__}: {error}); {then}"
                warnings.warn(said, EnableWarning, stacklevel=3)
                return
            known.calibrations[goal.label(known.setting.num_steps)] = made
            known.unsaved.add(goal)
            self._save_if_due(known, goal)

    def _fitted(self, follower: Attachment, known: Known, goal: Goal) -> Calibration:
        """Make the calls again on accelerated trajectories, and fit to where they led uncached."""
        steps, samples = known.setting.num_steps, known.samples
        computed, effort = goal.computed_steps(steps), self.options.effort
        decode = all(part.again.decodes for part in known.watched)
        if not decode:
            if goal.name == "min_psnr":
                raise CalibrationError("min_psnr needs decoded results, and the watched calls gave latents")
            effort = "fast"
        total = None if computed is None else most_evaluations(effort, samples, steps, computed) - samples * steps
        bar = tqdm(total=total, desc="ertacache", unit="call", disable=not self.options.progress, leave=False)
        if self.options.progress:
            cost = f"about {total / steps:.2g} uncached runs, " if total is not None else ""
            said = f"ertacache: calibrating on {samples} watched results, {cost}once for this setting ({known.setting})"
            self._say(bar)(said)
        try:
            with quiet(self.pipe), torch.no_grad():
                # a copy: other threads may watch more
                runs = WatchedRuns.of(follower, list(known.watched), bar, decode)
                runs.check()
                made = calibrate_runs(runs, goal.asked(), effort, self._say(bar))
            made.settings[KEY] = known.setting.key
            shape = list(known.watched[0].record.latents[0].shape[1:])
            if not decode or made.predicted:
                return replace(made, latent_shape=shape)
            fitted = float(runs.measured().mean())
            return replace(made, latent_shape=shape, settings={**made.settings, "fitted_psnr": fitted})
        finally:
            bar.close()
            for part in known.watched:
                part.again.encoded.clear()
            free = getattr(self.pipe, "maybe_free_model_hooks", None)
            if free is not None:  # calls that were stopped on the way have left their models where they were
                free()

    def _say(self, bar: Any) -> Callable[[str], None]:
        return lambda text: bar.write(text, file=sys.stderr) if self.options.progress else None

    def _save_if_due(self, known: Known, goal: Goal) -> None:
        """Store a calibration; where it cannot be stored, say so, and try again after the next call."""
        if goal not in known.unsaved:
            return
        made = known.calibration(goal)
        assert made is not None
        try:
            self.store.save(known.setting.name(goal), made)
        except OSError as error:
            said = f"the calibration for {known.setting} works but cannot be stored for the next process ({error})"
            warnings.warn(said, EnableWarning, stacklevel=4)
        else:
            known.unsaved.discard(goal)

    def audit(self, follower: Attachment, known: Known, goal: Goal, audited: WatchedCall) -> None:
        """Make an uncached call again as the calibration has it, and keep the distance."""
        calibration = known.calibration(goal)
        with self.gate.alone() as alone:
            if not alone or calibration is None or not follower.interceptions:
                return
            try:
                with quiet(self.pipe), torch.no_grad():
                    runs = WatchedRuns.of(follower, [audited], tqdm(disable=True), True)
                    runs.check()
                    measured = runs.quality(cache_of(calibration))
            except Exception as error:
                warnings.warn(f"this run could not be audited: {error}", EnableWarning, stacklevel=3)
                return
        known.audits += measured.tolist()
        promised, last = promise(calibration)[0], known.audits[-AUDITS:]
        mean = sum(last) / len(last)
        if promised is not None and len(last) > 1 and mean < promised - AUDIT_MARGIN:
            why = self._changed(calibration) or "prompts of another kind than those it was calibrated on?"
            said = f"the last {len(last)} audits measure {mean:.1f} dB, {promised:.1f} were promised: {why}"
            warnings.warn(said, EnableWarning, stacklevel=3)

    def _changed(self, calibration: Calibration) -> str:
        """What is known to have changed since a calibration."""
        changed = []
        if provenance.weights_fingerprint(self.pipe.transformer) != calibration.model.get("weights_fingerprint"):
            changed.append("the weights changed (an adapter?)")
        scale = getattr(self.pipe, "guidance_scale", None)
        if scale is not None and calibration.guidance_scale is not None and scale != calibration.guidance_scale:
            changed.append(f"guidance scale is {scale:g}, not {calibration.guidance_scale:g}")
        return ", ".join(changed)
