"""Calibrate a pipeline: record the uncached runs, choose the steps, fit, predict the quality."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import torch

from ertacache import provenance, solver
from ertacache.cache import Cache
from ertacache.calibration import Calibration, calibration_fields, check_computed_steps, computed_steps_for
from ertacache.errors import CalibrationError
from ertacache.fit.end_to_end import Refined, fit_end_to_end
from ertacache.fit.forms import best_form, best_refined_form
from ertacache.fit.predict import cross_validate, fold_count
from ertacache.fit.published import fit_published
from ertacache.fit.record import Record
from ertacache.fit.runs import MICRO_BATCH, Runs, quiet, record_runs
from ertacache.fit.schedule import CHOOSING_PROMPTS, GROWTH_PLACES, GROWTH_PROMPTS, choose_steps, error_growth
from ertacache.fit.step_by_step import (
    REFINED_FORM,
    SAFE_FORM,
    Form,
    StepFit,
    fit_last_step,
    fit_step_by_step,
)
from ertacache.fit.store import TrajectoryStore
from ertacache.published import PHI_OVER
from ertacache.replay import cache_of
from ertacache.schema import CALIBRATED_METHODS

GOALS = ("speedup", "computed_steps", "min_psnr", "threshold")


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    speedup: float | None = None,
    computed_steps: int | None = None,
    min_psnr: float | None = None,
    threshold: float | None = None,
    method: str = "ertacache",
    phi_over: str = PHI_OVER[0],
    search_budget: int = 0,
    refine: int = 0,
    folds: int = 2,
    micro_batch: int = MICRO_BATCH,
    memory_limit: int | None = None,
    progress: bool = True,
    model_id: str | None = None,
    **pipe_kwargs: Any,
) -> Calibration:
    """Calibrate a pipeline for one goal: speedup, computed_steps, min_psnr or threshold.

    Args:
        pipe: a diffusers pipeline with a transformer and a scheduler.
        prompts: calibration prompts. Run i takes prompt i and seed i, the shorter list repeated.
        seeds: of the noise of the runs, drawn on the CPU; one for all prompts by default.
        speedup: N / K; K = floor(N / speedup) steps are computed.
        computed_steps: K itself.
        min_psnr: dB to the uncached result; the smallest K whose predicted PSNR reaches it.
        threshold: the published method's lambda.
        method: "ertacache", or "paper" for the published one, which alone takes `threshold`.
        phi_over: of method "paper": what its timestep adjustment measures an error by, "output" or "change".
        search_budget: how many schedules may be tried for real, 0 for none. With any, the growth of errors is
            measured too, and what a step may combine is cross-validated.
        refine: prompts, the first ones, for which the coefficients are fitted a second time, end to end. 0 for none.
        folds: cross-validation folds of the quality prediction; 0 leaves it out.
        micro_batch: how many samples the transformer sees at a time, which bounds its peak memory.
        memory_limit: bytes of recorded trajectories that may stay in host memory; above it they go to files in the
            system's temporary folder, which are removed afterwards. None for no limit.
        progress: show a bar, and say before it what the calibration costs.
        model_id: name to keep in the file; the transformer's own by default.
        pipe_kwargs: everything else goes to the pipeline (num_inference_steps, height, width, ...).

    Returns:
        The calibration, not saved yet. It computes all steps where fewer do not reach `min_psnr`; the published
        method may compute fewer than asked for, where its threshold reaches no such number.

    Raises:
        CalibrationError: the request is not one of the above, or cannot be met.
        NumericsError: an output of the transformer holds NaN or Inf; it is looked at in every step.
        StateError: the pipeline's calls do not form runs that can be followed.
    """
    goal = _goal(method, speedup=speedup, computed_steps=computed_steps, min_psnr=min_psnr, threshold=threshold)
    if phi_over not in PHI_OVER:
        raise CalibrationError(f"phi_over is {phi_over!r}: it must be one of {', '.join(PHI_OVER)}")
    effort = Effort(search_budget, refine, folds) if method == "ertacache" else Effort(folds=folds)
    cost = Cost(goal, effort)
    with quiet(pipe), torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
        runs = record_runs(
            pipe,
            prompts,
            seeds,
            pipe_kwargs,
            micro_batch=micro_batch,
            progress=progress,
            memory_limit=memory_limit,
            on_begin=cost.announce,
            on_first_step=cost.estimate,
        )
        make = _published(runs, threshold, phi_over, folds) if method == "paper" else _ours(runs, effort)
        wanted = _computed_steps(goal, runs.record.num_steps)
        made = make(wanted) if min_psnr is None else _smallest(runs, make, min_psnr, folds)
    cost.close(runs)
    asked = {"goal": goal[0], "goal_value": goal[1]}
    if goal[0] == "speedup":
        asked = {"goal": "computed_steps", "goal_value": computed_steps_for(runs.record.num_steps, goal[1])}
    said = {"search_budget": search_budget, "refine": refine} if method == "ertacache" else {"phi_over": phi_over}
    return replace(made, **_provenance(runs, model_id, {**asked, **said}))


@dataclass(frozen=True)
class Effort:
    """How much a calibration does beside one fit; see `calibrate`."""

    search_budget: int = 0
    refine: int = 0
    folds: int = 0

    def most_evaluations(self, prompts: int, steps: int, computed: int) -> int:
        """An upper bound of the transformer evaluations, over all prompts, for K of N steps.

        P (N + (1 + F) K), exact without tries S and refinement R. Tries add 6 N (4 prompts) for the growth of errors
        and (S + 4 F) K P; refinement 4 K^2 + 8 K for each of R prompts, as much again where forms are tried, and 2 K P.
        """
        p, n, k, f = prompts, steps, computed, self.folds if prompts > 1 and self.folds > 1 else 0
        total = p * (n + (1 + min(f, p)) * k)
        if self.search_budget and k < n:
            total += GROWTH_PLACES * n * min(GROWTH_PROMPTS, p)
            total += (self.search_budget + 4 * f) * k * min(p, CHOOSING_PROMPTS)
        if self.refine and k < n:
            rounds = 2 if self.search_budget else 1
            total += rounds * (4 * k * k + 8 * k) * min(self.refine, p) + 3 * k * p
        return total


# -- the method --------------------------------------------------------------------------------------------

Make = Callable[[int | None], Calibration]  # computed steps -> a calibration with its predicted quality


def _ours(runs: Runs, effort: Effort) -> Make:
    """Choose the steps, fit, predict."""
    record, few = runs.record, runs.first(CHOOSING_PROMPTS)
    growth = error_growth(runs) if effort.search_budget else None

    def make(computed_steps: int | None) -> Calibration:
        assert computed_steps is not None  # only the published threshold leaves it open
        check_computed_steps(record.num_steps, computed_steps)
        if computed_steps == record.num_steps:
            return _all_computed(runs, effort.folds)
        form = REFINED_FORM if effort.refine else SAFE_FORM
        if growth is not None and fold_count(runs, effort.folds):
            form = best_form(few, choose_steps(few, computed_steps), fold_count(runs, effort.folds))
        schedule = choose_steps(few, computed_steps, effort.search_budget, growth, form)
        refined: Refined | None = None
        if effort.refine:
            if effort.search_budget:
                form = best_refined_form(runs.first(effort.refine), schedule, [REFINED_FORM, form])
            start = fit_step_by_step(runs, schedule, form)
            refined = fit_end_to_end(runs.first(effort.refine), schedule, start)
            coefficients = refined.coefficients
            if refined.ridge is not None:  # the last step leads to what the others aim at
                coefficients = fit_last_step(runs, schedule, coefficients, form)
        else:
            coefficients = fit_step_by_step(runs, schedule, form)
        predicted = cross_validate(runs, effort.folds, lambda rows: _fitted_to(runs, rows, schedule, form, refined))
        return bare_calibration(
            record, "ertacache", computed_steps=schedule, predicted=predicted, **calibration_fields(coefficients)
        )

    return make


def _fitted_to(runs: Runs, rows: Sequence[int], schedule: list[int], form: Form, refined: Refined | None) -> Cache:
    """The fit to some prompts, while all of them run."""
    latents = runs.record.latents
    if refined is None or refined.ridge is None:
        return StepFit(schedule, latents, rows, form=form)
    left_out = [row for row in range(len(runs)) if row not in rows]
    given, last = refined.without(left_out), runs.record.num_steps - 1
    return StepFit(schedule, latents, rows, form=form, given=given, first=last)


def _all_computed(runs: Runs, folds: int) -> Calibration:
    n = runs.record.num_steps
    made = bare_calibration(runs.record, "ertacache", computed_steps=list(range(n)), coefficients=[[1.0]] * n)
    return replace(made, predicted=cross_validate(runs, folds, lambda _: cache_of(made)))


def _published(runs: Runs, threshold: float | None, phi_over: str, folds: int) -> Make:
    """The published method, by its threshold or by a number of computed steps."""

    def fitted(record: Record, computed_steps: int | None) -> Calibration:
        fit = fit_published(
            record,
            threshold=threshold,
            computed_steps=None if threshold is not None else computed_steps,
            phi_over=phi_over,
        )
        return bare_calibration(record, "paper", **asdict(fit))

    def make(computed_steps: int | None) -> Calibration:
        if computed_steps is not None:
            check_computed_steps(runs.record.num_steps, computed_steps)
        made = fitted(runs.record, computed_steps)
        count = len(made.computed_steps)
        predicted = cross_validate(runs, folds, lambda rows: cache_of(fitted(runs.record.subset(rows), count)))
        return replace(made, predicted=predicted)

    return make


def _smallest(runs: Runs, make: Make, min_psnr: float, folds: int) -> Calibration:
    """The calibration with the fewest computed steps whose predicted PSNR reaches `min_psnr`.

    Bisects, which takes the prediction to grow with the number of steps; where it ripples, the result still
    holds `min_psnr` but one with fewer steps may too.
    """
    if fold_count(runs, folds) == 0:
        raise CalibrationError("min_psnr needs two or more calibration prompts and folds of 2 or more")
    low, high = 1, runs.record.num_steps
    best = None
    while low < high:
        middle = (low + high) // 2
        made = make(middle)
        if made.predicted and made.predicted["psnr"] >= min_psnr:
            best, high = made, middle
        else:
            low = middle + 1
    return best if best is not None and len(best.computed_steps) == low else make(low)


# -- around it ---------------------------------------------------------------------------------------------


def bare_calibration(record: Record, method: str, **fitted: Any) -> Calibration:
    """A calibration of recorded runs that does not say yet where it comes from."""
    return Calibration(
        method=method,
        num_inference_steps=record.num_steps,
        timesteps=record.timesteps,
        sigmas=record.sigmas,
        scheduler={},
        model={},
        latent_shape=list(record.latents[0].shape[1:]),
        dtype="",
        **fitted,
    )


def plain_calibration(runs: Runs, method: str, **fitted: Any) -> Calibration:
    """A calibration of given parts for recorded runs, without a predicted quality."""
    return replace(bare_calibration(runs.record, method, **fitted), **_provenance(runs, None, {}))


def recorded_runs(pipe: Any, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Runs:
    """The uncached runs that a calibration starts with, for studies of its parts; options as for `record_runs`."""
    own = {name: options.pop(name) for name in ("micro_batch", "memory_limit", "progress") if name in options}
    with quiet(pipe), torch.no_grad():
        return record_runs(pipe, prompts, seeds, options, **own)


def _goal(method: str, **given: Any) -> tuple[str, Any]:
    """The one goal that is given, with its value; raises CalibrationError for none or more."""
    if method not in CALIBRATED_METHODS:
        raise CalibrationError(f"method is {method!r}: it must be one of {', '.join(CALIBRATED_METHODS)}")
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise CalibrationError(f"give exactly one of {', '.join(given)}; got {', '.join(named) or 'none'}")
    if named[0] == "threshold" and method != "paper":
        raise CalibrationError(
            "threshold belongs to method='paper'; ask ertacache for speedup, computed_steps or min_psnr"
        )
    return named[0], given[named[0]]


def _computed_steps(goal: tuple[str, Any], steps: int) -> int | None:
    """K of a goal that says it."""
    name, value = goal
    return computed_steps_for(steps, value) if name == "speedup" else value if name == "computed_steps" else None


class Cost:
    """Say what a calibration costs: evaluations before the first one, time and memory after a step, and the truth."""

    def __init__(self, goal: tuple[str, Any], effort: Effort):
        self.goal, self.effort = goal, effort
        self.total = self.prompts = self.steps = 0
        self.started = 0.0

    def announce(self, bar: Any, prompts: int, steps: int) -> None:
        """Print the most that it takes; raises CalibrationError for a K that cannot be."""
        self.started, self.prompts, self.steps = time.perf_counter(), prompts, steps
        computed = _computed_steps(self.goal, steps)
        if computed is not None:
            check_computed_steps(steps, computed)
        self.total = self.effort.most_evaluations(prompts, steps, steps if computed is None else computed)
        if self.goal[0] == "min_psnr":  # a calibration for every K that bisection tries
            tries = steps.bit_length() + 1
            self.total += tries * (self.effort.most_evaluations(prompts, steps, steps) - prompts * steps)
        bar.total = self.total
        known = f", {computed} computed" if computed is not None else ""
        self._print(bar, f"at most {self._in_runs(self.total)} ({prompts} prompts, {steps} steps{known})")

    def estimate(self, bar: Any, store: TrajectoryStore) -> None:
        """Print the time, once a step of all prompts was made, and what the trajectories take."""
        seconds = time.perf_counter() - self.started
        self._print(
            bar,
            f"about {shown_time(seconds * self.total / self.prompts)} at {seconds:.2g} s a step; "
            f"trajectories: {stored(store)}",
        )

    def close(self, runs: Runs) -> None:
        """Print what it took."""
        self._print(runs.bar, f"took {self._in_runs(runs.bar.n)}")
        runs.bar.close()

    def _in_runs(self, evaluations: int) -> str:
        return f"{evaluations / self.steps:.3g} uncached runs ({evaluations} transformer evaluations)"

    def _print(self, bar: Any, text: str) -> None:
        if not bar.disable:
            bar.write(f"calibration: {text}", file=sys.stderr)


def stored(store: TrajectoryStore) -> str:
    """How much the trajectories take, and where they are."""
    place = f"in files in {store.place}" if store.on_disk else "in memory"
    limit = "" if store.limit is None else f" (limit {shown_size(store.limit)})"
    return f"{shown_size(store.planned)} {place}{limit}"


def shown_size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def shown_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read most easily."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _provenance(runs: Runs, model_id: str | None, effort: dict[str, Any]) -> dict[str, Any]:
    pipe = runs.pipe
    plain = {k: v for k, v in {**runs.kwargs, **effort}.items() if isinstance(v, (int, float, str, bool))}
    return {
        "scheduler": solver.identity(pipe.scheduler),
        "model": provenance.model_identity(pipe.transformer, model_id),
        "dtype": provenance.model_dtype(pipe.transformer),
        # as asked: where guidance is dynamic, the pipeline's own is the last step's by now
        "guidance_scale": runs.kwargs.get("guidance_scale", getattr(pipe, "guidance_scale", None)),
        "prompts": {"sha256": provenance.prompts_hash(runs.prompts, runs.seeds), "count": len(runs)},
        "settings": dict(sorted(plain.items())),
        "versions": provenance.package_versions(),
        "date": date.today().isoformat(),
    }
