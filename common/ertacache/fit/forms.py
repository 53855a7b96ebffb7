"""Choose the form of combination that the calibration prompts are enough for, by cross-validation of whole runs.

Every step is fitted on the trajectory that the steps before led to, so what one step owes to the prompts at hand
the next one inherits: the error of a single step on prompts left out says little, that of the whole run tells.
"""

from collections.abc import Sequence

from ertacache.fit.end_to_end import fit_end_to_end
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs, mean_log_error
from ertacache.fit.step_by_step import Form, fit_step_by_step, left_out_errors

OUTPUTS = (3, 4)


def forms_for(runs: Runs) -> list[Form]:
    """The forms that are tried, the simplest one first."""
    layouts = [None] if runs.record.layout is None else [None, runs.record.layout]
    return [Form(outputs, layout) for layout in layouts for outputs in OUTPUTS]


def best_form(runs: Runs, schedule: list[int], folds: int) -> Form:
    """The form whose final latents are nearest to the reference's on prompts that a fold did not fit to.

    Args:
        runs: recorded calibration runs.
        folds: 2 or more; fold i leaves out the prompts i, i + folds, ...
    """
    return min(forms_for(runs), key=lambda form: mean_log_error(left_out_errors(runs, schedule, form, folds)))


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
    few, rest = runs.first(half), runs.subset(range(half, len(runs)))
    refined = fit_end_to_end(few, schedule, fit_step_by_step(few, schedule, form))
    return mean_log_error(rest.errors(Rerun(schedule, refined.coefficients)))
