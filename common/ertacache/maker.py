"""Makes calibrations of different K from the same recorded runs: chooses the steps, fits, and predicts the quality."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ertacache import policy
from ertacache.announcement import Work
from ertacache.arrays import Array
from ertacache.calibration import Calibration, calibration_fields
from ertacache.descent import descend, known_layout, parts
from ertacache.errors import CalibrationError
from ertacache.fitting import REFINED_FORM, SAFE_FORM, Fitter, Form
from ertacache.forms import best_form, best_refined_form
from ertacache.linearisation import linearise
from ertacache.metrics import psnr, worst_decile
from ertacache.paper import fit_paper
from ertacache.recording import Recorder
from ertacache.rectification import Coefficients
from ertacache.refinement import Refined
from ertacache.refinement import refine as refine_end_to_end
from ertacache.replay import Replay
from ertacache.rerun import Rerun
from ertacache.runs import Runs, mean_log_error
from ertacache.schedule_search import CHOOSING_PROMPTS, choose_schedule, error_growth
from ertacache.timesteps import PHI_OVER


@dataclass
class Maker:
    """Makes calibrations of different K from the same recorded runs."""

    runs: Runs
    method: str
    threshold: float | None
    search_budget: int
    refine: int
    folds: int
    descent: int = 0
    phi_over: str = PHI_OVER[0]
    form: Form = SAFE_FORM  # of what was made last
    refined: Refined | None = None  # likewise

    @property
    def _fitted_runs(self) -> Runs:
        """Those that are fitted to: with descent, which owes much to its prompts, a quarter is left out."""
        return self.runs.first(len(parts(len(self.runs))[0])) if self.descent else self.runs

    @property
    def _choosing_runs(self) -> Runs:
        """Those that schedules and forms are chosen on: more would tell them apart no better."""
        return self._fitted_runs.first(CHOOSING_PROMPTS)

    @cached_property
    def _growth(self) -> Array | None:
        return error_growth(self._fitted_runs) if self.search_budget else None

    def work(self) -> Work:
        folds, paper = self._fold_count(), self.method == "paper"
        return Work(len(self.runs), folds, self.search_budget, self.refine, paper, self.descent)

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
            return bare_calibration(
                recorded, list(range(computed_steps)), "ertacache", coefficients=[[1.0]] * computed_steps
            )
        if self.descent:
            known_layout(self.runs)  # before anything that takes long
        self.form = self._chosen_form(computed_steps)
        schedule = choose_schedule(self._choosing_runs, computed_steps, self.search_budget, self._growth, self.form)
        coefficients = self.end_to_end(schedule) if self.refine else self._fitted(schedule)
        if self.descent:
            coefficients = self._descended(schedule, coefficients)
        return bare_calibration(recorded, schedule, "ertacache", **calibration_fields(coefficients))

    def _chosen_form(self, computed_steps: int) -> Form:
        """What the prompts are enough for, on the schedule that is best without a try."""
        if self._growth is None or self._fold_count() == 0:
            return REFINED_FORM if self.refine else SAFE_FORM
        schedule = choose_schedule(self._choosing_runs, computed_steps, 0, None)
        return best_form(self._choosing_runs, schedule, self._fold_count())

    def end_to_end(self, schedule: list[int]) -> Coefficients:
        """Fitted step by step, then refined on the first `refine` prompts."""
        few = self._fitted_runs.first(self.refine)
        if self.search_budget:  # as for the form of the step-by-step fit: what it costs goes with tries
            self.form = best_refined_form(few, schedule, [REFINED_FORM, self.form])
        self.refined = refine_end_to_end(few, linearise(few, schedule, self._fitted(schedule)))
        if self.refined.ridge is None:
            return self.refined.coefficients
        last = self._last_fitter(schedule, self.refined.coefficients)
        self._fitted_runs.run(last)
        return last.fitted()

    def _fitted(self, schedule: list[int]) -> Coefficients:
        fitter = Fitter(schedule, self.runs.recorded.latents, form=self.form)
        self._fitted_runs.run(fitter)
        return fitter.fitted()

    def _descended(self, schedule: list[int], start: Coefficients) -> Coefficients:
        """After descent, with the last step fitted once more where that carries over."""
        made = descend(self.runs, schedule, start, self.descent)
        self.form = Form(self.form.outputs, known_layout(self.runs))
        last = self._last_fitter(schedule, made.coefficients, list(range(len(self._fitted_runs))))
        errors = self.runs.squared_errors(self.runs.run(last))
        return last.fitted() if mean_log_error(errors[made.left_out]) <= made.after else made.coefficients

    def _last_fitter(self, schedule: list[int], refined: Coefficients, rows: list[int] | None = None) -> Fitter:
        """The last step leads to what the refined ones aim at, so its coefficients are fitted to that once more."""
        recorded = self.runs.recorded
        return Fitter(schedule, recorded.latents, rows, form=self.form, given=refined, start=recorded.num_steps - 1)

    def _fit_paper(self, computed_steps: int | None, rows: list[int] | None = None) -> Calibration:
        recorded = self.runs.recorded
        if computed_steps is not None:
            policy.check_computed_steps(recorded.num_steps, computed_steps)
        fit = fit_paper(
            recorded, threshold=self.threshold, computed_steps=computed_steps, rows=rows, phi_over=self.phi_over
        )
        return bare_calibration(recorded, method="paper", **asdict(fit))

    def _fold_count(self) -> int:
        count = len(self._fitted_runs)
        return min(self.folds, count) if self.folds >= 2 and count >= 2 else 0

    def _predict(self, made: Calibration) -> dict[str, Any] | None:
        """PSNR on prompts that were not fitted to: mean and worst decile in dB."""
        count = self._fold_count()
        if count == 0:
            return None
        if self.descent and len(made.computed_steps) < self.runs.recorded.num_steps:
            return self._predict_left_out(made)
        values = torch.zeros(len(self.runs))
        for fold in range(count):
            left_out = list(range(fold, len(self.runs), count))
            values[left_out] = self._fold_psnr(made, left_out)[left_out].float()
        return {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True)), "folds": count}

    def _predict_left_out(self, made: Calibration) -> dict[str, Any]:
        """The same from the prompts that descent leaves out."""
        rows = range(len(self._fitted_runs), len(self.runs))
        pixels = self.runs.of(rows).run(Rerun(made.computed_steps, made.combinations()), decode=True)
        values = psnr(pixels, self.runs.pictures[rows.start :])
        quality = {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True))}
        return {**quality, "folds": 1, "left_out": len(rows)}

    def _fold_psnr(self, made: Calibration, left_out: list[int]) -> Tensor:
        recorded = self.runs.recorded
        rows = [i for i in range(len(self.runs)) if i not in left_out]
        if self.method == "paper":
            steps = None if self.threshold is not None else len(made.computed_steps)
            controller: Any = Replay(self._fit_paper(steps, rows), self.runs.pipe)
        elif len(made.computed_steps) == recorded.num_steps:
            controller = Replay(made, self.runs.pipe)
        elif self.refined is not None and self.refined.ridge is not None:
            controller = self._last_fitter(made.computed_steps, self.refined.without(left_out), rows)
        else:
            controller = Fitter(made.computed_steps, recorded.latents, rows, form=self.form)
        return psnr(self.runs.run(controller, decode=True), self.runs.pictures)


def bare_calibration(recorded: Recorder, computed_steps: list[int], method: str, **fitted: Any) -> Calibration:
    """A calibration of the recorded runs that does not say yet where it comes from."""
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
