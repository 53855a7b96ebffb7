"""Says what a calibration costs: evaluations before its first one, time and memory once a step was made."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from ertacache import policy
from ertacache.descent import descent_evaluations, parts
from ertacache.forms import form_evaluations, refined_form_evaluations
from ertacache.recording import Recorder
from ertacache.refinement import refinement_evaluations
from ertacache.schedule_search import CHOOSING_PROMPTS, growth_evaluations

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass(frozen=True)
class Work:
    """What a calibration does beside recording: folds F of cross-validation, and what its schedule and fit take.

    Attributes:
        search_budget: schedules that are tried; with any of them the growth of errors is measured once.
        refine: prompts for which the coefficients are fitted a second time, end to end.
        paper: the published method, which is fitted on the recorded runs without a run of its own.
        descent: steps of gradient descent, in evaluations of about the same time; with any of them a quarter of the
            prompts is left out of the fit and tells the quality.
    """

    prompts: int
    folds: int
    search_budget: int = 0
    refine: int = 0
    paper: bool = False
    descent: int = 0

    def evaluations(self, steps: int, computed: int) -> int:
        """(N + (1 + F + tries) K) P transformer evaluations for K of N steps, and what the rest takes.

        K = N needs no fit and no search.
        """
        growth = self._growth(steps) if computed < steps else 0
        return steps * self.prompts + self._making(steps, computed) + growth

    def most_for_any(self, steps: int) -> int:
        """The most for a K that is found by bisection, every K on the way made and predicted.

        What the bisection ends with was made on the way, but for K = N, and for the paper's, which may miss its K.
        """

        def worst(low: int, high: int) -> int:
            if low == high:
                return self._making(steps, low) if low == steps or self.paper else 0
            middle = (low + high) // 2
            return self._making(steps, middle) + max(worst(low, middle), worst(middle + 1, high))

        return steps * self.prompts + worst(1, steps) + self._growth(steps)

    def _making(self, steps: int, computed: int) -> int:
        """Evaluations of one calibration from the recorded runs."""
        if self.paper or computed == steps:
            return self.folds * computed * self.prompts
        fitted, fitting = self.prompts, self.folds * computed * self.prompts
        if self.descent:
            fitted = len(parts(self.prompts)[0])
            # the last step is fitted again, and the prompts left out tell the quality
            fitting = descent_evaluations(computed, self.prompts, self.descent) + computed * self.prompts
            fitting += computed * (self.prompts - fitted) if self.folds else 0
        choosing = min(fitted, CHOOSING_PROMPTS)
        fitting += computed * (fitted + self.search_budget * choosing)
        if self.search_budget:
            fitting += form_evaluations(computed, choosing, self.folds)
        if not self.refine:
            return fitting
        few = min(self.refine, fitted)
        choosing = refined_form_evaluations(computed, few) if self.search_budget else 0
        last = computed * fitted  # the last step is fitted again once the others were refined
        return fitting + choosing + refinement_evaluations(computed, few) + last

    def _growth(self, steps: int) -> int:
        return growth_evaluations(steps, self.prompts) if self.search_budget and not self.paper else 0


class Announcement:
    """Follows the recording of the reference runs and prints what the whole calibration will cost.

    Args:
        goal: the one of speedup, computed_steps, min_psnr and threshold that was asked for, and its value.
        bar: the calibration's progress bar; nothing is printed where it is disabled.
    """

    def __init__(self, work: Work, goal: tuple[str, Any], bar: Any):
        self.work, self.goal, self.bar = work, goal, bar
        self.total = 0
        self.started = 0.0

    def follow(self, recorder: Recorder) -> None:
        recorder.on_begin, recorder.on_first_step = self.begin, self.first_step

    def begin(self, recorder: Recorder) -> None:
        """The grid is known and nothing was evaluated yet; raises CalibrationError for a K that cannot be."""
        self.started = time.perf_counter()
        steps = len(recorder.timesteps)
        computed = self._computed_steps(steps)
        known = f", {computed} computed" if computed is not None else ""
        self.total = self.work.evaluations(steps, computed) if computed is not None else self._most(steps)
        self.bar.total = self.total
        # refinement may need all its rounds and ridges, or few of them, and descent may end early
        exact = known and not self.work.refine and not self.work.descent
        self._print(
            f"{'' if exact else 'at most '}{self.total} transformer evaluations "
            f"({self.work.prompts} prompts, {steps} steps{known})"
        )

    def first_step(self, recorder: Recorder) -> None:
        """One step of all prompts was made: its time is known, and so is what the trajectories take."""
        seconds = time.perf_counter() - self.started
        self._print(
            f"about {shown_time(seconds * self.total / self.work.prompts)} at {seconds:.2g} s a step; "
            f"trajectories: {stored(recorder)}"
        )

    def _computed_steps(self, steps: int) -> int | None:
        name, value = self.goal
        if name not in ("speedup", "computed_steps"):
            return None
        computed = policy.computed_steps_for(steps, value) if name == "speedup" else value
        policy.check_computed_steps(steps, computed)
        return computed

    def _most(self, steps: int) -> int:
        if self.goal[0] == "min_psnr":
            return self.work.most_for_any(steps)
        return self.work.evaluations(steps, steps)

    def _print(self, text: str) -> None:
        if not self.bar.disable:
            self.bar.write(f"calibration: {text}", file=sys.stderr)


def stored(recorder: Recorder) -> str:
    """How much the trajectories take, and where they are."""
    store = recorder.store
    place = f"in files in {store.place}" if store.on_disk else "in memory"
    limit = "" if store.limit is None else f" (limit {shown_size(store.limit)})"
    return f"{shown_size(store.planned)} {place}{limit}"


def shown_size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    for unit, size in UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def shown_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read most easily."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
