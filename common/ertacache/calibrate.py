"""Makes a calibration: profile the uncached runs, choose the steps, fit on policy, predict the quality."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ertacache import policy, provenance, solver
from ertacache.announcement import Announcement, Work
from ertacache.calibration import METHODS, Calibration
from ertacache.errors import CalibrationError
from ertacache.fitting import Fitter
from ertacache.metrics import psnr, worst_decile
from ertacache.paper import fit_paper
from ertacache.recording import Recorder
from ertacache.rectification import Coefficients
from ertacache.refinement import JUDGED_PROMPTS, LinearisedRun, Refined, linearise
from ertacache.refinement import refine as refine_end_to_end
from ertacache.replay import Replay
from ertacache.rerun import Rerun
from ertacache.runs import MICRO_BATCH, Runs, make_runs, quiet
from ertacache.schedule_search import choose_schedule, error_growth


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
    search_budget: int = 0,
    refine: int = 0,
    folds: int = 2,
    micro_batch: int = MICRO_BATCH,
    memory_limit: int | None = None,
    progress: bool = True,
    model_id: str | None = None,
    **pipe_kwargs: Any,
) -> Calibration:
    """Calibrate a pipeline for the schedule that was asked for.

    Exactly one of `speedup` (K = floor(N / speedup)), `computed_steps` (K), `min_psnr` (the smallest K whose
    predicted PSNR to the uncached result reaches it, in dB) and `threshold` (the paper's lambda) is given.

    Args:
        pipe: a diffusers pipeline with a transformer and a scheduler.
        prompts: calibration prompts. Run i takes prompt i and seed i, the shorter list repeated.
        search_budget: how many schedules may be tried for real; each costs K steps of all prompts, and with `refine`
            about 2 K^2 steps of up to 16 prompts.
        refine: prompts, the first ones, for which the coefficients are fitted a second time, end to end; each costs
            about 2 K^2 steps. 0 leaves it out.
        folds: cross-validation folds of the quality prediction; 0 leaves it out.
        micro_batch: how many samples the transformer sees at a time, which bounds its peak memory.
        memory_limit: bytes of recorded trajectories that may stay in host memory; above it they go to files in the
            system's temporary folder, which are removed afterwards. None for no limit.
        model_id: name to keep in the file; the transformer's own by default.
        pipe_kwargs: everything else goes to the pipeline (num_inference_steps, height, width, ...).

    Raises:
        CalibrationError: the request is not one of the above, or cannot be met.
    """
    goal = _checked_goal(method, speedup, computed_steps, min_psnr, threshold)
    runs = make_runs(pipe, prompts, seeds, pipe_kwargs, micro_batch, progress, memory_limit)
    maker = _Maker(runs, method, threshold, search_budget, refine, folds)
    Announcement(maker.work(), goal, runs.bar).follow(runs.recorded)
    with quiet(pipe), torch.no_grad():
        runs.record()
        num_steps = runs.recorded.num_steps
        if speedup is not None:
            computed_steps = policy.computed_steps_for(num_steps, speedup)
        made = maker.smallest(min_psnr) if min_psnr is not None else maker.make(computed_steps)
    runs.bar.close()
    effort = {"search_budget": search_budget, "refine": refine} if method == "ertacache" else {}
    return replace(made, **_provenance(runs, model_id, effort))


def plain_calibration(runs: Runs, **fitted: Any) -> Calibration:
    """A calibration of given parts for the recorded runs, without a predicted quality."""
    return replace(_calibration(runs.recorded, **fitted), **_provenance(runs, None, {}))


def _checked_goal(method: str, speedup: Any, computed_steps: Any, min_psnr: Any, threshold: Any) -> tuple[str, Any]:
    """The one goal that is given, with its value; raises CalibrationError for none or more."""
    if method not in METHODS:
        raise CalibrationError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    given = {"speedup": speedup, "computed_steps": computed_steps, "min_psnr": min_psnr, "threshold": threshold}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise CalibrationError(f"give exactly one of {', '.join(given)}; got {', '.join(named) or 'none'}")
    if threshold is not None and method != "paper":
        raise CalibrationError(
            "threshold belongs to method='paper'; ask ertacache for speedup, computed_steps or min_psnr"
        )
    return named[0], given[named[0]]


@dataclass
class _Maker:
    """Makes calibrations of different K from the same recorded runs."""

    runs: Runs
    method: str
    threshold: float | None
    search_budget: int
    refine: int
    folds: int
    refined: Refined | None = None  # of what was made last

    @cached_property
    def _growth(self) -> NDArray[np.float64] | None:
        return error_growth(self.runs) if self.search_budget else None

    def work(self) -> Work:
        return Work(len(self.runs), self._fold_count(), self.search_budget, self.refine, self.method == "paper")

    def make(self, computed_steps: int | None) -> Calibration:
        """A calibration with K computed steps (or at the paper's threshold), its quality predicted."""
        self.refined = None
        if self.method == "paper":
            made = self._fit_paper(computed_steps)
        else:
            assert computed_steps is not None  # only the paper's threshold leaves it open
            made = self._fit(computed_steps)
        return replace(made, predicted=self._predict(made))

    def smallest(self, min_psnr: float) -> Calibration:
        """The calibration with the fewest computed steps whose predicted PSNR reaches `min_psnr`.

        Bisects, which takes the prediction to grow with the number of steps; where it ripples, the result still
        holds `min_psnr` but one with fewer steps may too.
        """
        if self._fold_count() == 0:
            raise CalibrationError("min_psnr needs two or more calibration prompts and folds of 2 or more")
        low, high = 1, self.runs.recorded.num_steps
        best = None
        while low < high:
            middle = (low + high) // 2
            made = self.make(middle)
            if made.predicted and made.predicted["psnr"] >= min_psnr:
                best, high = made, middle
            else:
                low = middle + 1
        if best is None or len(best.computed_steps) != low:
            best = self.make(low)
        return best

    def _fit(self, computed_steps: int) -> Calibration:
        recorded = self.runs.recorded
        policy.check_computed_steps(recorded.num_steps, computed_steps)
        if computed_steps == recorded.num_steps:
            return _calibration(
                recorded, list(range(computed_steps)), "ertacache", coefficients=[[1.0]] * computed_steps
            )
        schedule, coefficients = self._refined(computed_steps) if self.refine else self._stepwise(computed_steps)
        sample = coefficients.sample if any(coefficients.sample) else None
        fitted = {"coefficients": coefficients.outputs, "sample_coefficients": sample}
        return _calibration(recorded, schedule, "ertacache", **fitted)

    def _stepwise(self, computed_steps: int) -> tuple[list[int], Coefficients]:
        schedule = choose_schedule(self.runs, computed_steps, self.search_budget, self._growth)
        return schedule, self._fitted(schedule)

    def _refined(self, computed_steps: int) -> tuple[list[int], Coefficients]:
        """Schedules are judged by what refinement promises for them: the step-by-step fit ranks them otherwise."""

        @cache
        def linearised(count: int, schedule: tuple[int, ...]) -> LinearisedRun:
            return linearise(self.runs.first(count), list(schedule), self._fitted(list(schedule)))

        count = min(self.refine, len(self.runs))
        judged = min(count, JUDGED_PROMPTS)
        schedule = choose_schedule(
            self.runs,
            computed_steps,
            self.search_budget,
            self._growth,
            lambda schedule: linearised(judged, tuple(schedule)).promised_error(),
        )
        self.refined = refine_end_to_end(self.runs.first(count), linearised(count, tuple(schedule)))
        return schedule, self.refined.coefficients

    def _fitted(self, schedule: list[int]) -> Coefficients:
        fitter = Fitter(schedule, self.runs.recorded.latents)
        self.runs.run(fitter)
        return Coefficients.of_outputs(fitter.coefficients)

    def _fit_paper(self, computed_steps: int | None, rows: list[int] | None = None) -> Calibration:
        recorded = self.runs.recorded
        if computed_steps is not None:
            policy.check_computed_steps(recorded.num_steps, computed_steps)
        fit = fit_paper(recorded, threshold=self.threshold, computed_steps=computed_steps, rows=rows)
        return _calibration(recorded, method="paper", **asdict(fit))

    def _fold_count(self) -> int:
        return min(self.folds, len(self.runs)) if self.folds >= 2 and len(self.runs) >= 2 else 0

    def _predict(self, made: Calibration) -> dict[str, Any] | None:
        """PSNR on prompts that a fold did not fit to: mean and worst decile in dB."""
        count = self._fold_count()
        if count == 0:
            return None
        values = torch.zeros(len(self.runs))
        for fold in range(count):
            held_out = list(range(fold, len(self.runs), count))
            values[held_out] = self._fold_psnr(made, held_out)[held_out].float()
        return {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True)), "folds": count}

    def _fold_psnr(self, made: Calibration, held_out: list[int]) -> Tensor:
        recorded = self.runs.recorded
        rows = [i for i in range(len(self.runs)) if i not in held_out]
        if self.method == "paper":
            steps = None if self.threshold is not None else len(made.computed_steps)
            controller: Any = Replay(self._fit_paper(steps, rows), self.runs.pipe)
        elif len(made.computed_steps) == recorded.num_steps:
            controller = Replay(made, self.runs.pipe)
        elif self.refined is not None and self.refined.ridge is not None:
            controller = Rerun(made.computed_steps, self.refined.without(held_out))
        else:
            controller = Fitter(made.computed_steps, recorded.latents, rows)
        return psnr(self.runs.run(controller, decode=True), self.runs.pictures)


def _calibration(recorded: Recorder, computed_steps: list[int], method: str, **fitted: Any) -> Calibration:
    return Calibration(
        method=method,
        num_inference_steps=recorded.num_steps,
        computed_steps=computed_steps,
        timesteps=recorded.timesteps,
        sigmas=recorded.sigmas,
        scheduler={},
        model={},
        latent_shape=list(recorded.latents[0].shape[1:]),
        dtype="",
        **fitted,
    )


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
