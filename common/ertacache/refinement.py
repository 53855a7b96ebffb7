"""End-to-end rectification: coefficients that bring the final latents nearest to the reference's.

Fitting step by step puts every state as near to the reference as the kept outputs allow, but what is left over
grows or shrinks on the way to the end, and a later step can make up for an earlier one. So one Gauss-Newton step is
taken on the whole run: every coefficient that ends a segment is nudged, the rest of the run made again, and the
differences of the final latents are the columns of a least-squares problem for all coefficients together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ertacache.recording import Recorder
from ertacache.rectification import SAMPLE, Coefficients, prompt_weights
from ertacache.rerun import Rerun
from ertacache.runs import Runs, mean_log_error
from ertacache.trajectory import TrajectoryStore

Array = NDArray[np.float64]

# how far a nudge moves a state, relative to the initial latents: large enough for the arithmetic to tell
NUDGE = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # relative to the diagonal
FEW_PROMPTS_RIDGE = 1e-2  # where there are too few to choose
RIDGE_FOLDS = 4
FEWEST_PROMPTS = 4  # to choose a ridge by cross-validation
REWEIGHTINGS = 3
NUDGED_OUTPUTS = 3  # the newest ones; the last gains nothing over the step-by-step fit
JUDGED_PROMPTS = 16  # at most, that a schedule is judged on before it is chosen
RIDGE_TRIES = 4  # ridges that are tried on the run itself


@dataclass
class LinearisedRun:
    """The final latents near a run: x_N(a + d) ~ x_N(a) + J d, and what is left to the reference, R.

    Attributes:
        places: (step, index) of each of the n coefficients that vary.
        matrices: J^T J of each prompt, (P, n, n).
        vectors: J^T R of each prompt, (P, n).
        squares: R^T R of each prompt, (P,).
    """

    schedule: list[int]
    coefficients: Coefficients
    places: list[tuple[int, int]]
    matrices: Array
    vectors: Array
    squares: Array

    def errors(self, change: Array) -> Array:
        """Squared error of the final latents after `change`, of each prompt, to first order."""
        quadratic = np.einsum("i,pij,j->p", change, self.matrices, change)
        return np.maximum(self.squares - 2 * self.vectors @ change + quadratic, 0)

    def solve(self, rows: Sequence[int], ridge: float) -> Array:
        """The change of the coefficients for the prompts `rows`, by least squares reweighted as in a single step."""
        rows = list(rows)
        weights = np.ones(len(rows))
        change: Array = np.zeros(len(self.places))
        for _ in range(REWEIGHTINGS):
            matrix = np.tensordot(weights, self.matrices[rows], 1)
            diagonal = np.maximum(np.diag(matrix), 1e-300)
            vector = np.tensordot(weights, self.vectors[rows], 1)
            change = np.asarray(np.linalg.solve(matrix + ridge * np.diag(diagonal), vector), dtype=np.float64)
            weights = prompt_weights(self.errors(change)[rows])
        return change

    def best_ridge(self, rows: Sequence[int]) -> float:
        """The ridge whose changes do best on prompts that they were not solved for."""
        if len(rows) < FEWEST_PROMPTS:
            return FEW_PROMPTS_RIDGE
        return min(RIDGES, key=lambda ridge: self._left_out_error(rows, ridge))

    def promised_error(self) -> float:
        """Mean over prompts of the log squared error that refinement promises on prompts it was not solved for."""
        rows = range(len(self.squares))
        if len(rows) < FEWEST_PROMPTS:
            return mean_log_error(torch.from_numpy(self.errors(self.solve(rows, FEW_PROMPTS_RIDGE))))
        return min(self._left_out_error(rows, ridge) for ridge in RIDGES)

    def _left_out_error(self, rows: Sequence[int], ridge: float) -> float:
        count = min(RIDGE_FOLDS, len(rows) // 2)
        errors: Array = np.zeros(len(rows))
        for fold in range(count):
            left_out = list(rows[fold::count])
            change = self.solve([row for row in rows if row not in left_out], ridge)
            errors[fold::count] = self.errors(change)[left_out]
        return mean_log_error(torch.from_numpy(errors))

    def changed(self, change: Array) -> Coefficients:
        """The coefficients after `change`."""
        return self.coefficients.changed(self.places, change.tolist())


def linearisation_evaluations(computed_steps: int, prompts: int) -> int:
    """Transformer evaluations of `linearise`, over all prompts: the run, and the rest of it after each nudge."""
    rests = sum((min(s + 1, NUDGED_OUTPUTS) + 1) * (computed_steps - 1 - s) for s in range(computed_steps))
    return (computed_steps + rests) * prompts


def refinement_evaluations(computed_steps: int, prompts: int) -> int:
    """The most transformer evaluations of `refine`, over all prompts: with the ridges that are tried."""
    return linearisation_evaluations(computed_steps, prompts) + RIDGE_TRIES * computed_steps * prompts


def linearise(runs: Runs, schedule: list[int], coefficients: Coefficients) -> LinearisedRun:
    """Nudge each coefficient at the end of a segment in turn, and make the rest of the run again.

    `linearisation_evaluations` says what it takes.
    """
    recorded, rows = runs.recorded, slice(len(runs))
    ends = [step - 1 for step in schedule[1:]] + [recorded.num_steps - 1]
    counts = [min(len(coefficients.outputs[end]), NUDGED_OUTPUTS) for end in ends]
    store = TrajectoryStore(recorded.memory_limit, recorded.folder)
    # the nominal run's outputs, and a column for each coefficient
    store.plan((len(schedule) + sum(counts) + len(ends)) * 4 * recorded.latents[0][rows].numel())
    nominal = Rerun(schedule, coefficients, store=store)
    final = runs.run(nominal)
    places: list[tuple[int, int]] = []
    columns: list[Tensor] = []
    for segment, end in enumerate(ends):
        if recorded.gains[end] == 0:
            continue
        for index in (*range(counts[segment]), SAMPLE):
            added = recorded.latents[end][rows] if index == SAMPLE else nominal.outputs[segment - index]
            nudge = _nudge(recorded, end, added)
            nudged = coefficients.changed([(end, index)], [nudge])
            moved = runs.run(Rerun(schedule, nudged, nominal.outputs[: segment + 1]))
            columns.append(store.keep((moved - final) / nudge))
            places.append((end, index))
    return _reduced(schedule, coefficients, places, columns, recorded.latents[-1][rows].float() - final)


def _nudge(recorded: Recorder, step: int, added: Tensor) -> float:
    """The change of a coefficient of `added` that moves the state after the step by NUDGE."""
    latents = recorded.latents[0]
    size = NUDGE.get(latents.dtype, NUDGE[torch.float32]) * float(latents.float().std())
    return size / (abs(recorded.gains[step]) * max(float(added.float().square().mean().sqrt()), 1e-12))


def _reduced(
    schedule: list[int],
    coefficients: Coefficients,
    places: list[tuple[int, int]],
    columns: list[Tensor],
    rest: Tensor,
) -> LinearisedRun:
    products = []
    for prompt in range(len(rest)):  # one at a time, since the float64 copies are large
        stacked = torch.stack([c[prompt].double().flatten() for c in (*columns, rest)])
        products.append((stacked @ stacked.T).numpy())
    grams = np.stack(products)
    return LinearisedRun(schedule, coefficients, places, grams[:, :-1, :-1], grams[:, :-1, -1], grams[:, -1, -1])


@dataclass
class Refined:
    """What refinement led to.

    Attributes:
        linear: the run it was solved at.
        ridge: of the step that was taken; None where none came nearer.
    """

    coefficients: Coefficients
    linear: LinearisedRun
    ridge: float | None

    def without(self, left_out: Sequence[int]) -> Coefficients:
        """What it would have led to without some prompts, for cross-validation."""
        if self.ridge is None:
            return self.coefficients
        rows = [row for row in range(len(self.linear.squares)) if row not in set(left_out)]
        # fewer prompts may need a larger ridge
        return self.linear.changed(self.linear.solve(rows, max(self.ridge, self.linear.best_ridge(rows))))


def refine(runs: Runs, linear: LinearisedRun) -> Refined:
    """Coefficients with a smaller error of the final latents than those linearised at, or these where there are none.

    Cross-validation sees the run to first order only, and likes steps that lead too far for that. So larger ridges
    than its choice are tried on the run itself, as long as they do better.

    Args:
        runs: of the prompts that are fitted to; 8 do, 16 are better by some tenths of a decibel.
        linear: of `linearise` on the same runs.
    """
    rows = range(len(runs))
    least = mean_log_error(torch.from_numpy(linear.squares) / runs.recorded.latents[0][0].numel())
    best = Refined(linear.coefficients, linear, None)
    first = RIDGES.index(linear.best_ridge(rows))
    for ridge in RIDGES[first : first + RIDGE_TRIES]:
        refined = linear.changed(linear.solve(rows, ridge))
        error = runs.final_error(Rerun(linear.schedule, refined))
        if error < least:
            best, least = Refined(refined, linear, ridge), error
        elif best.ridge is not None:
            break
    return best
