"""Which form of combination the calibration prompts are enough for, by cross-validation of whole runs.

Every step is fitted on the trajectory that the steps before led to, so what one step owes to the prompts at hand
the next one inherits: the error of a single step on prompts left out says little, that of the whole run tells.
"""

from collections.abc import Sequence

import torch

from ertacache.fitting import Fitter, Form
from ertacache.linearisation import linearise
from ertacache.refinement import refine, refinement_evaluations
from ertacache.rerun import Rerun
from ertacache.runs import Runs, mean_log_error

OUTPUTS = (3, 4)


def forms_for(runs: Runs) -> list[Form]:
    """The forms that are tried, the simplest one first."""
    layouts = [None] if runs.layout is None else [None, runs.layout]
    return [Form(outputs, layout) for layout in layouts for outputs in OUTPUTS]


def form_evaluations(computed_steps: int, prompts: int, folds: int) -> int:
    """The most transformer evaluations of `best_form`, over all prompts."""
    return 2 * len(OUTPUTS) * folds * computed_steps * prompts


def best_form(runs: Runs, schedule: list[int], folds: int) -> Form:
    """The form whose final latents are nearest to the reference's on prompts that a fold did not fit to.

    Args:
        runs: recorded calibration runs.
        folds: 2 or more; fold i leaves out the prompts i, i + folds, ...
    """
    return min(forms_for(runs), key=lambda form: _left_out_error(runs, schedule, form, folds))


def _left_out_error(runs: Runs, schedule: list[int], form: Form, folds: int) -> float:
    errors = torch.zeros(len(runs))
    for fold in range(folds):
        left_out = list(range(fold, len(runs), folds))
        rows = [row for row in range(len(runs)) if row not in left_out]
        final = runs.run(Fitter(schedule, runs.recorded.latents, rows, form=form))
        errors[left_out] = runs.squared_errors(final)[left_out]
    return mean_log_error(errors)


def refined_form_evaluations(computed_steps: int, prompts: int) -> int:
    """The most transformer evaluations of `best_refined_form`, over all prompts, for two forms."""
    return 2 * (2 * computed_steps * prompts + refinement_evaluations(computed_steps, prompts // 2))


def best_refined_form(runs: Runs, schedule: list[int], forms: Sequence[Form]) -> Form:
    """Of forms that are going to be refined end to end, the one that carries over best to other prompts.

    Which form is best step by step does not tell: of channels that refinement leaves as they are, the fit may owe
    more to its prompts than refinement gains. So the first half of the prompts is fitted to and refined on, and the
    rest judges.

    Args:
        runs: recorded calibration runs; with fewer than two of them the first form is taken.
        forms: the simplest one first.
    """
    forms = list(dict.fromkeys(forms))
    if len(forms) == 1 or len(runs) < 2:
        return forms[0]
    return min(forms, key=lambda form: _refined_error(runs, schedule, form))


def _refined_error(runs: Runs, schedule: list[int], form: Form) -> float:
    half = len(runs) // 2
    fitter = Fitter(schedule, runs.recorded.latents, list(range(half)), form=form)
    runs.run(fitter)
    few = runs.first(half)
    refined = refine(few, linearise(few, schedule, fitter.fitted()))
    final = runs.run(Rerun(schedule, refined.coefficients))
    return mean_log_error(runs.squared_errors(final)[half:])
