"""Calibrate a pipeline: record the uncached runs, choose the steps, fit, predict the quality."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from typing import Any, overload

import torch

from ertacache import provenance, solver
from ertacache.cache import Cache, Coefficients
from ertacache.calibration import Bundle, Calibration, calibration_fields, check_computed_steps, computed_steps_for
from ertacache.errors import CalibrationError
from ertacache.fit.end_to_end import Refined, fit_end_to_end, prompts_within
from ertacache.fit.predict import FOLDS, cross_validate
from ertacache.fit.published import fit_published
from ertacache.fit.record import Record
from ertacache.fit.runs import MICRO_BATCH, Runs, quiet, record_runs
from ertacache.fit.schedule import choose_steps
from ertacache.fit.step_by_step import StepFit, fit_last_step, fit_step_by_step
from ertacache.fit.together import Together
from ertacache.published import PHI_OVER
from ertacache.replay import cache_of
from ertacache.schema import CALIBRATED_METHODS

EFFORTS = ("fast", "balanced", "best")
AnyRuns = Runs | Together
BEST_RUNS = 100  # uncached runs that effort "best" may cost in all


@overload
def calibrate(pipe: Any, prompts: str | Sequence[str], *, speedup: Sequence[float], **rest: Any) -> Bundle: ...


@overload
def calibrate(pipe: Any, prompts: str | Sequence[str], *, speedup: float | None = None, **rest: Any) -> Calibration: ...


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    speedup: float | Sequence[float] | None = None,
    computed_steps: int | None = None,
    min_psnr: float | None = None,
    threshold: float | None = None,
    effort: str = "balanced",
    method: str = "ertacache",
    phi_over: str = PHI_OVER[0],
    micro_batch: int = MICRO_BATCH,
    memory_limit: int | None = None,
    progress: bool = True,
    model_id: str | None = None,
    **pipe_kwargs: Any,
) -> Calibration | Bundle:
    """Calibrate a pipeline for one goal: speedup, computed_steps, min_psnr or threshold.

    A list of `speedup` or of `num_inference_steps` makes a bundle, from one recording for each number of steps.

    Args:
        pipe: a diffusers pipeline with a transformer and a scheduler.
        prompts: calibration prompts; eight are enough. Run i takes prompt i and seed i, the shorter list repeated.
        seeds: of the noise of the runs, drawn on the CPU; one for all prompts by default.
        speedup: N / K; K = floor(N / speedup) steps are computed.
        computed_steps: K itself.
        min_psnr: dB to the uncached result; the smallest K whose predicted PSNR reaches it.
        threshold: the published method's lambda.
        effort: "fast", "balanced" or "best": 1.5 P, 2.5 P and at most 100 uncached runs for P prompts and K = N / 2.
            "fast" predicts no quality; "best" fits end to end.
        method: "ertacache", or "paper" for the published one, which alone takes `threshold`.
        phi_over: of method "paper": what its timestep adjustment measures an error by, "output" or "change".
        micro_batch: how many samples the transformer sees at a time, which bounds its peak memory.
        memory_limit: bytes of recorded trajectories that may stay in host memory; above it they go to files in the
            system's temporary folder, which are removed afterwards. None for no limit.
        progress: show a bar, and say before it what the calibration costs.
        model_id: name to keep in the file; the transformer's own by default.
        pipe_kwargs: everything else goes to the pipeline (num_inference_steps, height, width, ...).

    Returns:
        The calibration or the bundle, not saved yet. It computes all steps where fewer do not reach `min_psnr`; the
        published method may compute fewer than asked for, where its threshold reaches no such number.

    Raises:
        CalibrationError: the request is not one of the above, or cannot be met.
        NumericsError: an output of the transformer holds NaN or Inf; it is looked at in every step.
        StateError: the pipeline's calls do not form runs that can be followed.
    """
    speedups = list(speedup) if isinstance(speedup, Sequence) else [speedup]
    given = pipe_kwargs.get("num_inference_steps")
    counts = list(given) if isinstance(given, Sequence) else [given]
    others = {"computed_steps": computed_steps, "min_psnr": min_psnr, "threshold": threshold}
    goals = [_goal(method, speedup=one, **others) for one in speedups]
    if not goals or not counts:
        raise CalibrationError("speedup and num_inference_steps must not be empty")
    for name, value, allowed in (("phi_over", phi_over, PHI_OVER), ("effort", effort, EFFORTS)):
        if value not in allowed:
            raise CalibrationError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")
    said = {"effort": effort} if method == "ertacache" else {"phi_over": phi_over}
    made: list[Calibration] = []
    for count in counts:
        cost = Cost(goals, effort)
        with quiet(pipe), torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
            runs = record_runs(
                pipe,
                prompts,
                seeds,
                pipe_kwargs if count is None else {**pipe_kwargs, "num_inference_steps": count},
                micro_batch=micro_batch,
                progress=progress,
                memory_limit=memory_limit,
                on_begin=cost.announce,
            )
            if method == "paper":
                make: Make = lambda k: fit_paper(runs, k, threshold, phi_over, effort)  # noqa: B023,E731
            else:
                make = lambda k: fit(runs, k, effort)  # noqa: B023,E731
            fitted = [_reached(runs, make, goal) for goal in goals]
        cost.close(runs)
        made += [replace(one, **provenance_of(runs, model_id, {**asked, **said})) for one, asked in fitted]
    return made[0] if speedups == [speedup] and counts == [given] else Bundle(made)


def calibrate_runs(runs: AnyRuns, goal: tuple[str, Any], effort: str, **settings: Any) -> Calibration:
    """Calibrate on runs that were recorded before, for a goal ("speedup", 2.0); `settings` go to the file as well."""
    with quiet(runs.pipe), torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
        made, asked = _reached(runs, lambda k: fit(runs, k, effort), goal)
    return replace(made, **provenance_of(runs, None, {**asked, "effort": effort, **settings}))


def _reached(runs: AnyRuns, make: "Make", goal: tuple[str, Any]) -> tuple[Calibration, dict[str, Any]]:
    """The calibration that reaches a goal, and the goal as a file says it."""
    wanted = _computed_steps(goal, runs.record.num_steps)
    made = _smallest(runs, make, goal[1]) if goal[0] == "min_psnr" else make(wanted)
    if goal[0] == "speedup":
        return made, {"goal": "computed_steps", "goal_value": wanted}
    return made, {"goal": goal[0], "goal_value": goal[1]}


def most_evaluations(effort: str, prompts: int, steps: int, computed: int) -> int:
    """An upper bound of the transformer evaluations over P prompts, for K of N steps: P (N + 3 K), or BEST_RUNS N.

    P (N + K) for "fast", which predicts no quality. "best" fits end to end with what is left of BEST_RUNS.
    """
    if effort == "fast":
        return prompts * (steps + computed)
    total = prompts * (steps + (1 + FOLDS) * computed)
    return max(total, BEST_RUNS * steps) if effort == "best" else total


# -- the method --------------------------------------------------------------------------------------------

Make = Callable[[int | None], Calibration]  # computed steps -> a calibration with its predicted quality


def fit(runs: AnyRuns, computed_steps: int | None, effort: str) -> Calibration:
    """Choose the steps, fit, predict."""
    assert computed_steps is not None  # only the published threshold leaves it open
    record = runs.record
    check_computed_steps(record.num_steps, computed_steps)
    if computed_steps == record.num_steps:
        return _all_computed(runs, effort)
    schedule = choose_steps(record, computed_steps, runs.gram())
    coefficients = fit_step_by_step(runs, schedule)
    refined = None
    if effort == "best":
        assert isinstance(runs, Runs)  # one batch, since it nudges all of it at once
        refined = _refined(runs, schedule, coefficients)
    if refined is not None and isinstance(runs, Runs):  # the last step leads to what the others aim at
        coefficients = fit_last_step(runs, schedule, refined.coefficients)
    predicted = None
    if effort != "fast":
        predicted = cross_validate(runs, lambda rows: _fitted_to(runs, rows, schedule, refined))
    return bare_calibration(
        record, "ertacache", computed_steps=schedule, predicted=predicted, **calibration_fields(coefficients)
    )


def _refined(runs: Runs, schedule: list[int], start: Coefficients) -> Refined | None:
    """The fit end to end, on as many prompts as the cost allows; None where it comes no nearer."""
    steps, computed = runs.record.num_steps, len(schedule)
    spent = most_evaluations("balanced", len(runs), steps, computed) + computed * len(runs)  # and the last step's
    prompts = min(len(runs), prompts_within(BEST_RUNS * steps - spent, computed))
    refined = fit_end_to_end(runs.first(prompts), schedule, start) if prompts > 1 else None
    return refined if refined is not None and refined.ridge is not None else None


def _fitted_to(runs: AnyRuns, rows: Sequence[int], schedule: list[int], refined: Refined | None) -> Cache:
    """The fit to some prompts, while all of them run."""
    if refined is None:
        return StepFit(schedule, runs.record.latents, rows)
    left_out = [row for row in range(len(runs)) if row not in rows]
    last = runs.record.num_steps - 1
    return StepFit(schedule, runs.record.latents, rows, given=refined.without(left_out), first=last)


def _all_computed(runs: AnyRuns, effort: str) -> Calibration:
    n = runs.record.num_steps
    made = bare_calibration(runs.record, "ertacache", computed_steps=list(range(n)), coefficients=[[1.0]] * n)
    return made if effort == "fast" else replace(made, predicted=cross_validate(runs, lambda _: cache_of(made)))


def fit_paper(
    runs: Runs, computed_steps: int | None, threshold: float | None, phi_over: str, effort: str
) -> Calibration:
    """Fit the published method, by its threshold or by a number of computed steps, and predict its quality."""

    def fitted(record: Record, count: int | None) -> Calibration:
        count = None if threshold is not None else count
        made = fit_published(record, threshold=threshold, computed_steps=count, phi_over=phi_over)
        return bare_calibration(record, "paper", **asdict(made))

    if computed_steps is not None:
        check_computed_steps(runs.record.num_steps, computed_steps)
    made = fitted(runs.record, computed_steps)
    if effort == "fast":
        return made
    count = len(made.computed_steps)
    predicted = cross_validate(runs, lambda rows: cache_of(fitted(runs.record.subset(rows), count)))
    return replace(made, predicted=predicted)


def _smallest(runs: AnyRuns, make: Make, min_psnr: float) -> Calibration:
    """The calibration with the fewest computed steps whose predicted PSNR reaches `min_psnr`.

    Bisects, which takes the prediction to grow with the number of steps; where it ripples, the result still
    holds `min_psnr` but one with fewer steps may too.
    """
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
    """Print what a calibration costs before its first evaluation, and what it took."""

    def __init__(self, goals: list[tuple[str, Any]], effort: str):
        self.goals, self.effort, self.steps = goals, effort, 0

    def announce(self, bar: Any, prompts: int, steps: int) -> None:
        """Print the most that it takes; raises CalibrationError for a K that cannot be."""
        self.steps, recorded = steps, prompts * steps
        bar.total, known = recorded, []
        for goal in self.goals:
            computed = _computed_steps(goal, steps)
            if computed is not None:
                check_computed_steps(steps, computed)
                known.append(str(computed))
            total = most_evaluations(self.effort, prompts, steps, steps if computed is None else computed) - recorded
            if goal[0] == "min_psnr":
                if self.effort == "fast" or prompts < FOLDS:
                    raise CalibrationError(
                        "min_psnr needs a prediction: two prompts or more, and more effort than fast"
                    )
                total *= steps.bit_length() + 1  # a calibration for every K that bisection tries
            bar.total += total
        said = f", {' and '.join(known)} computed" if known else ""
        self._print(bar, f"at most {self._in_runs(bar.total)} for {prompts} prompts of {steps} steps{said}")

    def close(self, runs: Runs) -> None:
        """Print what it took."""
        self._print(runs.bar, f"took {self._in_runs(runs.bar.n)}")
        runs.bar.close()

    def _in_runs(self, evaluations: int) -> str:
        return f"{evaluations / self.steps:.3g} uncached runs ({evaluations} transformer evaluations)"

    def _print(self, bar: Any, text: str) -> None:
        if not bar.disable:
            bar.write(f"calibration: {text}", file=sys.stderr)


def provenance_of(runs: AnyRuns, model_id: str | None, effort: dict[str, Any]) -> dict[str, Any]:
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
