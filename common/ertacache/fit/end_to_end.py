"""Stage 4: fit the coefficients end to end, to the final latents.

Fitting step by step puts every state as near to the reference as the kept outputs allow, but what is left over grows or
shrinks on the way to the end, and a later step can make up for an earlier one. So a Gauss-Newton step is taken on the
whole run. Every coefficient that ends a segment is nudged in turn and the rest of the run made again; the differences
of the final latents are the columns of one least-squares problem for all coefficients together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ertacache.cache import Coefficients
from ertacache.fit.least_squares import REWEIGHTINGS, grams, prompt_weights
from ertacache.fit.record import Array, Record
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs, mean_log_error
from ertacache.fit.store import TrajectoryStore

LATENTS = -1  # index of the latents' coefficient among those of a step
# how far a nudge moves a state, relative to the initial latents: large enough for the arithmetic to tell
STATE_NUDGES = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # relative to the diagonal
FEW_PROMPTS_RIDGE = 1e-2  # where there are too few to choose
RIDGE_FOLDS = 4
FEWEST_PROMPTS = 4  # to choose a ridge by cross-validation
NUDGED_OUTPUTS = 3  # the newest ones; the last gains nothing over the step-by-step fit
RIDGE_TRIES = 4  # ridges that are tried on the run itself
JUDGES = 8  # prompts that choose among these: ones that were not fitted to, where there are FEWEST_PROMPTS of them
FEWEST_FITTED = 3  # of prompts; fewer say little of others

Place = tuple[int, int]  # a coefficient: its step, and the index of its output, or LATENTS


@dataclass
class LinearisedRun:
    """The final latents near a run: x_N(a + d) ~ x_N(a) + J d, and what is left to the reference, R.

    Attributes:
        places: the n coefficients that vary.
        matrices: J^T J of each prompt, (P, n, n).
        vectors: J^T R of each prompt, (P, n).
        squares: R^T R of each prompt, (P,).
    """

    schedule: list[int]
    coefficients: Coefficients
    places: list[Place]
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
            diagonal = ridge * np.maximum(np.diag(matrix), 1e-300)
            vector = np.tensordot(weights, self.vectors[rows], 1)
            change = np.asarray(np.linalg.solve(matrix + np.diag(diagonal), vector), dtype=np.float64)
            weights = prompt_weights(self.errors(change)[rows])
        return change

    def best_ridge(self, rows: Sequence[int]) -> float:
        """The ridge whose changes do best on prompts that they were not solved for."""
        if len(rows) < FEWEST_PROMPTS:
            return FEW_PROMPTS_RIDGE
        return min(RIDGES, key=lambda ridge: self._left_out_error(rows, ridge))

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
        return changed(self.coefficients, self.places, change.tolist())


def segment_ends(schedule: Sequence[int], num_steps: int) -> list[int]:
    """The last step of each segment, a computed step and the reused ones after it."""
    return [step - 1 for step in schedule[1:]] + [num_steps - 1]


def prompts_within(evaluations: int, computed_steps: int, prompts: int) -> int:
    """How many of the prompts `fit_end_to_end` may fit to for that many transformer evaluations over all of them."""
    k = computed_steps
    nudged = sum((min(s + 1, NUDGED_OUTPUTS) + 1) * (k - 1 - s) for s in range(k))
    return max(0, (evaluations - (RIDGE_TRIES + 1) * k * min(prompts, JUDGES)) // (k + nudged))


def linearise(runs: Runs, schedule: list[int], coefficients: Coefficients) -> LinearisedRun:
    """Nudge each coefficient at the end of a segment in turn, and make the rest of the run again."""
    record = runs.record
    ends = segment_ends(schedule, record.num_steps)
    counts = [min(len(coefficients.outputs[end]), NUDGED_OUTPUTS) for end in ends]
    store = TrajectoryStore(record.memory_limit)
    # the nominal run's outputs, and a column for each coefficient
    store.plan((len(schedule) + sum(counts) + len(ends)) * 4 * record.latents[0].numel())
    nominal = Rerun(schedule, coefficients, store=store)
    final = runs.latents(nominal)
    places: list[Place] = []
    columns: list[Tensor] = []
    for segment, end in enumerate(ends):
        if record.gains[end] == 0:
            continue
        for index in (*range(counts[segment]), LATENTS):
            added = record.latents[end] if index == LATENTS else nominal.outputs[segment - index]
            nudge = _nudge(record, end, added)
            nudged = changed(coefficients, [(end, index)], [nudge])
            moved = runs.latents(Rerun(schedule, nudged, nominal.outputs[: segment + 1], fills=runs.blanks is None))
            columns.append(store.keep((moved - final) / nudge))
            places.append((end, index))
    products = grams([*columns, record.latents[-1].float() - final])
    return LinearisedRun(
        schedule, coefficients, places, products[:, :-1, :-1], products[:, :-1, -1], products[:, -1, -1]
    )


def _nudge(record: Record, step: int, added: Tensor) -> float:
    """The change of a coefficient of `added` that moves the state after the step by STATE_NUDGES."""
    latents = record.latents[0]
    size = STATE_NUDGES.get(latents.dtype, STATE_NUDGES[torch.float32]) * float(latents.float().std())
    return size / (abs(record.gains[step]) * max(float(added.float().square().mean().sqrt()), 1e-12))


def changed(coefficients: Coefficients, places: Sequence[Place], change: Sequence[float]) -> Coefficients:
    """The coefficients with `change` added at `places`."""
    outputs, latents = [list(row) for row in coefficients.outputs], list(coefficients.latents)
    for (step, index), value in zip(places, change, strict=True):
        if index == LATENTS:
            latents[step] += float(value)
        else:
            outputs[step][index] += float(value)
    return Coefficients(outputs, latents, coefficients.channels)


@dataclass
class Refined:
    """What fitting end to end led to.

    Attributes:
        linear: the run that it was solved at.
        ridge: None where none came nearer, and the coefficients are those of the start.
        error: mean log error of the final latents.
    """

    coefficients: Coefficients
    linear: LinearisedRun
    ridge: float | None
    error: float

    def without(self, left_out: Sequence[int]) -> Coefficients:
        """What it would have led to without some of its prompts, for cross-validation."""
        if self.ridge is None:
            return self.coefficients
        rows = [row for row in range(len(self.linear.squares)) if row not in set(left_out)]
        # fewer prompts may need a larger ridge
        return self.linear.changed(self.linear.solve(rows, max(self.ridge, self.linear.best_ridge(rows))))


def fit_end_to_end(runs: Runs, schedule: list[int], start: Coefficients, fitted: int | None = None) -> Refined:
    """Take a Gauss-Newton step from `start` towards the reference's final latents, where it leads nearer.

    Cross-validation sees the run to first order only, and likes steps that lead too far for that. So larger ridges
    than its choice are tried on the run itself, as long as they do better, judged by prompts that were not fitted to,
    where there are enough of them.

    Args:
        fitted: how many of the prompts are fitted to, the first ones; None for all. Eight do, 16 are better by some
            tenths of a decibel.
    """
    count = len(runs) if fitted is None else fitted
    linear = linearise(runs.first(count), schedule, start)
    unseen = range(count, len(runs))
    judged = runs.subset(unseen[:JUDGES] if len(unseen) >= FEWEST_PROMPTS else range(len(runs))[-JUDGES:])
    best = Refined(start, linear, None, mean_log_error(judged.errors(Rerun(schedule, start))))
    first = RIDGES.index(linear.best_ridge(range(count)))
    for ridge in RIDGES[first : first + RIDGE_TRIES]:
        refined = linear.changed(linear.solve(range(count), ridge))
        error = mean_log_error(judged.errors(Rerun(schedule, refined)))
        if error < best.error:
            best = Refined(refined, linear, ridge, error)
        elif best.ridge is not None:
            break
    return best
