"""End-to-end rectification: coefficients that bring the final latents nearest to the reference's.

Fitting step by step puts every state as near to the reference as the kept outputs allow, but what is left over
grows or shrinks on the way to the end, and a later step can make up for an earlier one. So Gauss-Newton steps are
taken on the whole run (`linearisation`), a second one where the first led elsewhere than it promised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ertacache.arrays import Array
from ertacache.linearisation import RIDGES, LinearisedRun, linearisation_evaluations, linearise
from ertacache.rectification import Coefficients
from ertacache.rerun import Rerun
from ertacache.runs import Runs, mean_log_error

RIDGE_TRIES = 4  # ridges that are tried on the run itself
ROUNDS = 2  # Gauss-Newton steps, at most
KEPT_PROMISE = 0.02  # a step that ends this near to its promise (log10 of the squared error, so 0.2 dB) is the last


def refinement_evaluations(computed_steps: int, prompts: int) -> int:
    """The most transformer evaluations of `refine`, over all prompts: every round, with the ridges that are tried."""
    return ROUNDS * (linearisation_evaluations(computed_steps, prompts) + RIDGE_TRIES * computed_steps * prompts)


@dataclass
class Refined:
    """What refinement led to.

    Attributes:
        linear: the run that the last step was solved at.
        ridge: of that step; None where none came nearer.
        error: of the final latents, as `Runs.final_error`.
        promised: what the linearised run said it would be.
    """

    coefficients: Coefficients
    linear: LinearisedRun
    ridge: float | None
    error: float
    promised: float

    def without(self, left_out: Sequence[int]) -> Coefficients:
        """What it would have led to without some prompts, for cross-validation."""
        if self.ridge is None:
            return self.coefficients
        rows = [row for row in range(len(self.linear.squares)) if row not in set(left_out)]
        # fewer prompts may need a larger ridge
        return self.linear.changed(self.linear.solve(rows, max(self.ridge, self.linear.best_ridge(rows))))


def refine(runs: Runs, linear: LinearisedRun) -> Refined:
    """Coefficients with a smaller error of the final latents than those linearised at, or these where there are none.

    Args:
        runs: of the prompts that are fitted to; 8 do, 16 are better by some tenths of a decibel.
        linear: of `linearise` on the same runs, at the step-by-step fit.
    """
    best = _stepped(runs, linear)
    for _ in range(ROUNDS - 1):
        if best.ridge is None or best.error - best.promised < KEPT_PROMISE:
            break
        again = _stepped(runs, linearise(runs, linear.schedule, best.coefficients, linear.coefficients))
        if again.ridge is None:
            break
        best = again
    return best


def _stepped(runs: Runs, linear: LinearisedRun) -> Refined:
    """One Gauss-Newton step.

    Cross-validation sees the run to first order only, and likes steps that lead too far for that. So larger ridges
    than its choice are tried on the run itself, as long as they do better.
    """
    rows, size = range(len(runs)), runs.recorded.latents[0][0].numel()

    def mean_error(squares: Array) -> float:
        return mean_log_error(torch.from_numpy(squares) / size)

    least = mean_error(linear.squares)
    best = Refined(linear.coefficients, linear, None, least, least)
    first = RIDGES.index(linear.best_ridge(rows))
    for ridge in RIDGES[first : first + RIDGE_TRIES]:
        change = linear.solve(rows, ridge)
        refined = linear.changed(change)
        error = runs.final_error(Rerun(linear.schedule, refined))
        if error < best.error:
            best = Refined(refined, linear, ridge, error, mean_error(linear.errors(change)))
        elif best.ridge is not None:
            break
    return best
