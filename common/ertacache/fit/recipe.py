"""Calibrate a pipeline: record the uncached runs, choose the steps, fit, predict the quality."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, overload

import torch

from ertacache.api import check_parts_of
from ertacache.cache import Cache, Coefficients
from ertacache.calibration import Bundle, Calibration, check_computed_steps
from ertacache.checks import check_no_other_cache
from ertacache.errors import CalibrationError
from ertacache.fit.cost import Cost, computed_steps_of, goal_of, most_evaluations
from ertacache.fit.end_to_end import FEWEST_FITTED, Refined, fit_end_to_end, prompts_within
from ertacache.fit.predict import FOLDS, cross_validate, guarded
from ertacache.fit.published import fit_published
from ertacache.fit.record import Record
from ertacache.fit.result import bare_calibration, calibration_of, plain_reuse, provenance_of
from ertacache.fit.runs import MICRO_BATCH, Runs, quiet, record_runs
from ertacache.fit.schedule import choose_steps
from ertacache.fit.step_by_step import StepFit, fit_last_step, fit_step_by_step
from ertacache.intercept import attachment_of
from ertacache.published import PHI_OVER
from ertacache.replay import cache_of

EFFORTS = ("fast", "balanced", "best")
GAIN = 0.5  # dB on prompts left out, for which the fit end to end is kept; on so few, less says nothing


@overload
def calibrate(pipe: Any, prompts: Any = None, *, speedup: Sequence[float], **rest: Any) -> Bundle: ...


@overload
def calibrate(pipe: Any, prompts: Any = None, *, speedup: float | None = None, **rest: Any) -> Calibration: ...


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str] | None = None,
    *,
    seeds: Sequence[int] | int = (0,),
    speedup: float | Sequence[float] | None = None,
    computed_steps: int | None = None,
    min_psnr: float | None = None,
    threshold: float | None = None,
    effort: str = "balanced",
    method: str = "ertacache",
    phi_over: str = PHI_OVER[0],
    per_prompt: Mapping[str, Sequence[Any]] | None = None,
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
            None for a pipeline that takes none, whose `per_prompt` says what it takes.
        seeds: of the noise of the runs, drawn on the CPU; one for all prompts by default.
        speedup: N / K; K = floor(N / speedup) steps are computed.
        computed_steps: K itself.
        min_psnr: dB to the uncached result; the smallest K whose predicted PSNR reaches it.
        threshold: the published method's lambda.
        effort: "fast", "balanced" or "best": 1.5 P, 2.5 P + 2 or at most 100 uncached runs for P prompts, K = N / 2.
            "fast" predicts no quality; "best" fits end to end.
        method: "ertacache", or "paper" for the published one, which alone takes `threshold`.
        phi_over: of method "paper": what its timestep adjustment measures an error by, "output" or "change".
        per_prompt: arguments of which each prompt has its own, as lists: {"image": images}, {"prompt_embeds": ...}.
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
    goals = [goal_of(method, speedup=one, **others) for one in speedups]
    if not goals or not counts:
        raise CalibrationError("speedup and num_inference_steps must not be empty")
    for name, value, allowed in (("phi_over", phi_over, PHI_OVER), ("effort", effort, EFFORTS)):
        if value not in allowed:
            raise CalibrationError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")
    seeds = (seeds,) if isinstance(seeds, int) else seeds
    _check_request(pipe, prompts, micro_batch, {**(per_prompt or {}), **pipe_kwargs})
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
                per_prompt=per_prompt,
                micro_batch=micro_batch,
                progress=progress,
                memory_limit=memory_limit,
                on_begin=cost.announce,
            )
            if method == "paper":
                make: Make = lambda k: fit_paper(runs, k, threshold, phi_over, effort)  # noqa: B023,E731
            else:
                make = lambda k: fit(runs, k, effort)  # noqa: B023,E731
            fitted = [_reached(runs, make, goal, effort, cost.say) for goal in goals]
        cost.close(runs)
        made += [replace(one, **provenance_of(runs, model_id, {**asked, **said})) for one, asked in fitted]
    return made[0] if speedups == [speedup] and counts == [given] else Bundle(made)


def calibrate_runs(
    runs: Runs, goal: tuple[str, Any], effort: str, say: Callable[[str], None], **settings: Any
) -> Calibration:
    """Calibrate on runs that were recorded before, for a goal ("speedup", 2.0); `settings` go to the file as well."""
    with quiet(runs.pipe), torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
        made, asked = _reached(runs, lambda k: fit(runs, k, effort), goal, effort, say)
    return replace(made, **provenance_of(runs, None, {**asked, "effort": effort, **settings}))


def _reached(
    runs: Runs, make: "Make", goal: tuple[str, Any], effort: str, say: Callable[[str], None]
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration that reaches a goal, and the goal as a file says it."""
    wanted = computed_steps_of(goal, runs.record.num_steps)
    made = _smallest(runs, make, goal[1]) if goal[0] == "min_psnr" else make(wanted)
    if effort != "fast":
        made = guarded(runs, made, say)
    if goal[0] == "speedup":
        return made, {"goal": "computed_steps", "goal_value": wanted}
    return made, {"goal": goal[0], "goal_value": goal[1]}


# -- the method --------------------------------------------------------------------------------------------

Make = Callable[[int | None], Calibration]  # computed steps -> a calibration with its predicted quality


def fit(runs: Runs, computed_steps: int | None, effort: str) -> Calibration:
    """Choose the steps, fit, predict."""
    assert computed_steps is not None  # only the published threshold leaves it open
    record = runs.record
    check_computed_steps(record.num_steps, computed_steps)
    if computed_steps == record.num_steps:
        return _all_computed(runs, effort)
    latents = len(record.streams) + record.copies
    if effort == "best" and latents > 1:
        raise CalibrationError(
            f"the pipeline steps {latents} latents a prompt, and effort 'best' fits one: use effort 'balanced'"
        )
    schedule = choose_steps(record, computed_steps)
    coefficients = fit_step_by_step(runs, schedule)
    if effort == "fast":
        return calibration_of(record, schedule, coefficients, None)
    predicted = _predicted(runs, schedule)
    refined = _refined(runs, schedule, coefficients) if effort == "best" else None
    if refined is not None:
        better = _predicted(runs, schedule, refined)
        if predicted is None or better is None or better["psnr"] >= predicted["psnr"] + GAIN:
            # the last step leads to what the others aim at
            coefficients, predicted = fit_last_step(runs, schedule, refined.coefficients), better
    return calibration_of(record, schedule, coefficients, predicted)


def _predicted(runs: Runs, schedule: list[int], refined: Refined | None = None) -> dict[str, Any] | None:
    return cross_validate(runs, lambda rows: _fitted_to(runs, rows, schedule, refined))


def _check_request(pipe: Any, prompts: Any, micro_batch: int, arguments: Mapping[str, Any]) -> None:
    """Raise for what cannot be calibrated, before anything runs."""
    check_parts_of(pipe)
    check_no_other_cache(pipe)
    if attachment_of(pipe) is not None:
        raise CalibrationError("a calibration is applied to this pipeline: ertacache.remove(pipe) before you calibrate")
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise CalibrationError(f"micro_batch is {micro_batch!r}: it must be a whole number from 1")
    if not (prompts is None or isinstance(prompts, Sequence)):
        raise CalibrationError(
            f"prompts is a {type(prompts).__name__}: give texts, or None with per_prompt={{'prompt_embeds': ...}}"
        )
    embedded = [
        name for name, v in arguments.items() if "prompt_embeds" in name and "negative" not in name and v is not None
    ]
    if embedded and prompts is not None:
        raise CalibrationError(
            f"give prompts or {embedded[0]}, not both: calibrate(pipe, None, per_prompt={{'{embedded[0]}': ...}})"
        )


def _refined(runs: Runs, schedule: list[int], start: Coefficients) -> Refined | None:
    """The fit end to end, on as many prompts as the cost allows; None where these are too few or it helps nothing."""
    steps, computed = runs.record.num_steps, len(schedule)
    # and of the last step, and of a second cross-validation
    spent = most_evaluations("balanced", len(runs), steps, computed) + (1 + FOLDS) * computed * len(runs)
    left = most_evaluations("best", len(runs), steps, computed) - spent
    fitted = min(len(runs), prompts_within(left, computed, len(runs)))
    if fitted < min(FEWEST_FITTED, len(runs)):
        return None
    refined = fit_end_to_end(runs, schedule, start, fitted)
    return refined if refined.ridge is not None else None


def _fitted_to(runs: Runs, rows: Sequence[int], schedule: list[int], refined: Refined | None) -> Cache:
    """The fit to some prompts, while all of them run."""
    if refined is None:
        return StepFit.of(runs.record, schedule, rows)
    left_out = [row for row in range(len(runs)) if row not in rows]
    last = runs.record.num_steps - 1
    return StepFit(schedule, runs.record.latents, rows, given=refined.without(left_out), first=last)


def _all_computed(runs: Runs, effort: str) -> Calibration:
    n = runs.record.num_steps
    made = plain_reuse(runs.record, list(range(n)))
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
    if runs.record.streams or not runs.record.uniform:
        raise CalibrationError("method 'paper' takes one kind of latents that all move alike: use method 'ertacache'")
    made = fitted(runs.record, computed_steps)
    if effort == "fast":
        return made
    count = len(made.computed_steps)
    predicted = cross_validate(runs, lambda rows: cache_of(fitted(runs.record.subset(rows), count)))
    return replace(made, predicted=predicted)


def _smallest(runs: Runs, make: Make, min_psnr: float) -> Calibration:
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
