"""The final latents of an accelerated run to first order in its coefficients, and the least squares on them.

Every coefficient that ends a segment is nudged and the rest of the run made again; the differences of the final
latents are the columns of one least-squares problem for all coefficients together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ertacache.arrays import Array
from ertacache.recording import Recorder
from ertacache.rectification import LATENTS, Coefficients
from ertacache.rerun import Rerun
from ertacache.runs import Runs, mean_log_error
from ertacache.trajectory import TrajectoryStore
from ertacache.weighting import REWEIGHTINGS, prompt_weights

# how far a nudge moves a state, relative to the initial latents: large enough for the arithmetic to tell
STATE_NUDGES = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # relative to the diagonal
FEW_PROMPTS_RIDGE = 1e-2  # where there are too few to choose
RIDGE_FOLDS = 4
FEWEST_PROMPTS = 4  # to choose a ridge by cross-validation
NUDGED_OUTPUTS = 3  # the newest ones; the last gains nothing over the step-by-step fit


@dataclass
class LinearisedRun:
    """The final latents near a run: x_N(a + d) ~ x_N(a) + J d, and what is left to the reference, R.

    Attributes:
        places: (step, index) of each of the n coefficients that vary.
        matrices: J^T J of each prompt, (P, n, n).
        vectors: J^T R of each prompt, (P, n).
        squares: R^T R of each prompt, (P,).
        origin: d that leads back to the step-by-step fit, (n,), towards which the ridge shrinks.
    """

    schedule: list[int]
    coefficients: Coefficients
    places: list[tuple[int, int]]
    matrices: Array
    vectors: Array
    squares: Array
    origin: Array

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
            vector = np.tensordot(weights, self.vectors[rows], 1) + diagonal * self.origin
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
        return self.coefficients.changed(self.places, change.tolist())


def segment_ends(schedule: Sequence[int], num_steps: int) -> list[int]:
    """The last step of each segment, a computed step and the reused ones after it."""
    return [step - 1 for step in schedule[1:]] + [num_steps - 1]


def linearisation_evaluations(computed_steps: int, prompts: int) -> int:
    """Transformer evaluations of `linearise`, over all prompts: the run, and the rest of it after each nudge."""
    rests = sum((min(s + 1, NUDGED_OUTPUTS) + 1) * (computed_steps - 1 - s) for s in range(computed_steps))
    return (computed_steps + rests) * prompts


def linearise(
    runs: Runs, schedule: list[int], coefficients: Coefficients, fit: Coefficients | None = None
) -> LinearisedRun:
    """Nudge each coefficient at the end of a segment in turn, and make the rest of the run again.

    `linearisation_evaluations` says what it takes.

    Args:
        coefficients: of the run.
        fit: those of the step-by-step fit, where they are others.
    """
    recorded, rows = runs.recorded, slice(len(runs))
    ends = segment_ends(schedule, recorded.num_steps)
    counts = [min(len(coefficients.outputs[end]), NUDGED_OUTPUTS) for end in ends]
    store = TrajectoryStore(recorded.memory_limit)
    # the nominal run's outputs, and a column for each coefficient
    store.plan((len(schedule) + sum(counts) + len(ends)) * 4 * recorded.latents[0][rows].numel())
    nominal = Rerun(schedule, coefficients, store=store)
    final = runs.run(nominal)
    places: list[tuple[int, int]] = []
    columns: list[Tensor] = []
    for segment, end in enumerate(ends):
        if recorded.gains[end] == 0:
            continue
        for index in (*range(counts[segment]), LATENTS):
            added = recorded.latents[end][rows] if index == LATENTS else nominal.outputs[segment - index]
            nudge = _nudge(recorded, end, added)
            nudged = coefficients.changed([(end, index)], [nudge])
            moved = runs.run(Rerun(schedule, nudged, nominal.outputs[: segment + 1]))
            columns.append(store.keep((moved - final) / nudge))
            places.append((end, index))
    origin = np.array([(fit or coefficients).value(place) - coefficients.value(place) for place in places])
    grams = _grams([*columns, recorded.latents[-1][rows].float() - final])
    return LinearisedRun(
        schedule, coefficients, places, grams[:, :-1, :-1], grams[:, :-1, -1], grams[:, -1, -1], origin
    )


def _nudge(recorded: Recorder, step: int, added: Tensor) -> float:
    """The change of a coefficient of `added` that moves the state after the step by STATE_NUDGES."""
    latents = recorded.latents[0]
    size = STATE_NUDGES.get(latents.dtype, STATE_NUDGES[torch.float32]) * float(latents.float().std())
    return size / (abs(recorded.gains[step]) * max(float(added.float().square().mean().sqrt()), 1e-12))


def _grams(columns: list[Tensor]) -> Array:
    """The inner products of the columns (P, ...) of each prompt, (P, n, n)."""
    products = []
    for prompt in range(len(columns[0])):  # one at a time, since the float64 copies are large
        stacked = torch.stack([c[prompt].double().flatten() for c in columns])
        products.append((stacked @ stacked.T).numpy())
    return np.stack(products)
