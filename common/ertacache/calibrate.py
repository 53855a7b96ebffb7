"""Makes a calibration: profile the uncached runs, choose the steps, fit on policy, predict the quality."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ertacache import policy, provenance, solver
from ertacache.calibration import METHODS, Calibration
from ertacache.errors import CalibrationError
from ertacache.fitting import Fitter
from ertacache.metrics import psnr, worst_decile
from ertacache.paper import fit_paper
from ertacache.recording import Recorder, gram_matrix
from ertacache.replay import Replay
from ertacache.runs import MICRO_BATCH, Runs, make_runs, quiet


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
    folds: int = 2,
    micro_batch: int = MICRO_BATCH,
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
        search_budget: how many other schedules the swap search may try; each costs K steps of all prompts.
        folds: cross-validation folds of the quality prediction; 0 leaves it out.
        micro_batch: how many samples the transformer sees at a time, which bounds its peak memory.
        model_id: name to keep in the file; the transformer's own by default.
        pipe_kwargs: everything else goes to the pipeline (num_inference_steps, height, width, ...).

    Raises:
        CalibrationError: the request is not one of the above, or cannot be met.
    """
    _check_request(method, speedup, computed_steps, min_psnr, threshold)
    runs = make_runs(pipe, prompts, seeds, pipe_kwargs, micro_batch, progress)
    with quiet(pipe), torch.no_grad():
        runs.record()
        num_steps = runs.recorded.num_steps
        if speedup is not None:
            computed_steps = policy.computed_steps_for(num_steps, speedup)
        maker = _Maker(runs, method, threshold, search_budget, folds)
        maker.announce(computed_steps)
        made = maker.smallest(min_psnr) if min_psnr is not None else maker.make(computed_steps)
    runs.bar.close()
    return replace(made, **_provenance(runs, model_id))


def plain_calibration(runs: Runs, **fitted: Any) -> Calibration:
    """A calibration of given parts for the recorded runs, without a predicted quality."""
    return replace(_calibration(runs.recorded, **fitted), **_provenance(runs, None))


def _check_request(method: str, speedup: Any, computed_steps: Any, min_psnr: Any, threshold: Any) -> None:
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


@dataclass
class _Maker:
    """Makes calibrations of different K from the same recorded runs."""

    runs: Runs
    method: str
    threshold: float | None
    search_budget: int
    folds: int

    def announce(self, computed_steps: int | None) -> None:
        """Say what the calibration costs, before the part that the request decides on starts."""
        runs, n = len(self.runs), self.runs.recorded.num_steps
        fits = (1 + self._fold_count()) if self.method == "ertacache" else self._fold_count()
        if computed_steps is None or self.runs.bar.disable:
            return
        total = (n + (fits + self.search_budget) * computed_steps) * runs
        self.runs.bar.total = total
        rate = self.runs.bar.format_dict["rate"] or self.runs.bar.n / max(self.runs.bar.format_dict["elapsed"], 1e-9)
        print(
            f"calibration: {total} transformer evaluations ({runs} prompts, {n} steps, {computed_steps} computed), "
            f"about {total / max(rate, 1e-9):.0f} s",
            file=sys.stderr,
        )

    def make(self, computed_steps: int | None) -> Calibration:
        """A calibration with K computed steps (or at the paper's threshold), its quality predicted."""
        made = self._fit_paper(computed_steps) if self.method == "paper" else self._fit(computed_steps)
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
            if made.predicted["psnr"] >= min_psnr:
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
        errors = policy.reuse_errors(gram_matrix(recorded.outputs), np.asarray(recorded.gains))
        schedule = policy.best_schedule(errors, computed_steps)
        if self.search_budget:
            schedule = policy.swap_search(schedule, self.runs.fitted_error, recorded.num_steps, self.search_budget)
        fitter = Fitter(schedule, recorded.latents)
        self.runs.run(fitter)
        return _calibration(recorded, schedule, "ertacache", coefficients=fitter.coefficients)

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
            rows = [i for i in range(len(self.runs)) if i not in held_out]
            values[held_out] = self._fold_psnr(made, rows)[held_out].float()
        return {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True)), "folds": count}

    def _fold_psnr(self, made: Calibration, rows: list[int]) -> Tensor:
        recorded = self.runs.recorded
        if self.method == "paper":
            steps = None if self.threshold is not None else len(made.computed_steps)
            controller: Any = Replay(self._fit_paper(steps, rows), self.runs.pipe)
        elif len(made.computed_steps) == recorded.num_steps:
            controller = Replay(made, self.runs.pipe)
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


def _provenance(runs: Runs, model_id: str | None) -> dict[str, Any]:
    pipe = runs.pipe
    plain = {k: v for k, v in runs.kwargs.items() if isinstance(v, (int, float, str, bool))}
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
