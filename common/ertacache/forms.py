"""Which form of combination the calibration prompts are enough for, by cross-validation of whole runs.

Every step is fitted on the trajectory that the steps before led to, so what one step owes to the prompts at hand
the next one inherits: the error of a single step on prompts left out says little, that of the whole run tells.
"""

import torch

from ertacache.fitting import Fitter, Form
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
