"""A learned solver of K evaluations: a linear solver fitted by back-propagation to the uncached final latents.

Free are all weights, on the noise and on every output so far, without a constraint on their sum, and the times that
the model is given. A step's length is what its weights say, so step times are free too. That is the form of bespoke
non-stationary solvers (BNS, arXiv 2403.01329) and of DyWeight (arXiv 2603.11607), own implementation. As in BNS the
loss is the mean over prompts of the log squared error, which is a mean of decibels.

It starts from the best of several classical solvers on the best of several grids. Adam works on whitened weights: a
unit moves the next state by its own size in whatever direction the outputs span, since neighbouring ones are nearly
equal.
"""

import copy
import io
import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compare.rivals.base import Run
from compare.rivals.fitted import BATCH, LinearRival
from compare.rivals.linear import LinearSolver, LinearSteps, driven, linear_form, on_grid, solver_names, warped
from compare.rivals.runs import together
from ertacache.files import write_atomically
from ertacache.fit.cost import BEST_RUNS

BACKWARD = 2  # evaluations that a backward pass counts as
POWERS = (1.0, 1.3, 0.85, 1.15, 1.5)  # of the grids that are tried, all solvers on the first two
FLOOR = 1e-4  # of the whitening, relative to the largest eigenvalue
# tuned on prompts of the tiny FLUX pipeline that it is not fitted to, beyond its budget
LEARNING_RATE, TIMES_RATE, MOMENTS, WARM_UP = 2e-3, 3.0, (0.9, 0.99), 5
RATES = (LEARNING_RATE, LEARNING_RATE / 4)  # with a budget the better one, found for free: video wants less
# without a budget
MOST_PROMPTS, MOST_LEFT_OUT = 256, 16
CHECK_EVERY, PATIENCE = 25, 3  # gradient steps; checks without GAIN after which the learning rate falls
GAIN, FALL, FALLS = 0.05, 0.3, 2  # dB; factor of the learning rate, and how often it falls before the end


class Weights(nn.Module):
    """The free numbers of a linear solver around a classical one."""

    def __init__(self, start: LinearSolver, gram: Tensor, floor: float = FLOOR):
        super().__init__()
        self.start = start
        count = len(start)
        self.change = nn.Parameter(torch.zeros(count, count + 1))
        self.shift = nn.Parameter(torch.zeros(count))
        self.spacing = (start.times - torch.cat([start.times[1:], torch.zeros(1)])).abs().clamp_min(1.0)
        self.scales = [_whitening(gram[: k + 2, : k + 2], floor) for k in range(count)]

    def solver(self) -> LinearSolver:
        """The solver, with the graph of its numbers."""
        count = len(self.start)
        rows = torch.stack(
            [nn.functional.pad(self.change[k, : k + 2] @ self.scales[k], (0, count - k - 1)) for k in range(count)]
        )
        rows = rows.cumsum(0)  # what moves a state moves all later ones
        return LinearSolver(
            self.start.times + self.shift * self.spacing,
            self.start.noise + rows[:, 0],
            self.start.outputs + rows[:, 1:],
        )


def _whitening(gram: Tensor, floor: float) -> Tensor:
    """G^(-1/2) of columns with Gram matrix G, so that unit changes move a state by unit size."""
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp_min(0) + floor * values.max()
    return (vectors / values.sqrt() @ vectors.T).float()


def finals_of(pipe: Any, solver: LinearSolver, runs: Sequence[Run], gradients: bool = False) -> tuple[Tensor, Tensor]:
    """Final latents (P, ...), and the Gram matrix (K + 1, K + 1) of noise and outputs, a mean over their values."""
    steps: list[LinearSteps] = []

    def begin(_: Any) -> LinearSteps:
        steps.append(LinearSteps(solver))
        return steps[-1]

    with driven(pipe, begin, gradients):
        finals = together(runs, num_inference_steps=len(solver)).float()
    columns = torch.cat([torch.stack(one.columns).detach().flatten(1) for one in steps], 1).double()
    return finals, columns @ columns.T / columns.shape[1]


def log_errors(finals: Tensor, wanted: Tensor) -> Tensor:
    """Natural log of the mean squared error of each prompt."""
    return (finals - wanted).square().flatten(1).mean(1).clamp_min(1e-20).log()


def decibels(logs: Tensor) -> float:
    """Mean over prompts in dB of a signal of unit power."""
    return -10 / math.log(10) * float(logs.mean())


class LearnedSolver(LinearRival):
    """The rival, with the budget of our best effort or without one.

    Args:
        unlimited: fit on many prompts until prompts that are left out come no nearer.
        budget: uncached runs that it may cost otherwise, those of the calibration prompts among them.
    """

    form = "x' = a x_0 + sum of b_j o_j over all outputs, free times, fitted by back-propagation to the final latents"

    def __init__(self, unlimited: bool = False, budget: float = BEST_RUNS):
        super().__init__()
        self.unlimited, self.budget = unlimited, budget
        self.name = "learned-solver-unlimited" if unlimited else "learned-solver"
        self.prompts = MOST_PROMPTS if unlimited else None
        self.optional = unlimited  # it takes hours

    def fit(self, pipe: Any, count: int) -> dict[str, Any]:
        with torch.no_grad():
            parts = [self.runs[start : start + BATCH] for start in range(0, len(self.runs), BATCH)]
            wanted = torch.cat([together(some).float() for some in parts])
            start, gram, evaluations, stock = best_classical(pipe, self.runs[0], wanted[:1], count, self.steps)
        evaluations += self.steps * len(self.runs)
        left = self.budget * self.steps - evaluations

        def trained(rate: float) -> dict[str, Any]:
            training = Training(pipe, self.runs, wanted, Weights(start, gram))
            if self.unlimited:
                training.until_it_stops(self.path(count, ".pt"))
            else:
                training.for_steps(int(left / ((1 + BACKWARD) * count)), rate)
            return {
                "runs": (evaluations + training.evaluations) / self.steps,
                "stock": stock,
                "rate": rate,
                "history": training.history,
                "solver": training.weights.solver().to_dict(),
            }

        if self.unlimited:
            return trained(LEARNING_RATE)
        tried = [self.kept(count, f"-{rate:g}.json", partial(trained, rate)) for rate in RATES]
        # each prompt comes once in the last so many steps
        return max(tried, key=lambda made: math.fsum(made["history"][-len(self.runs) :]))


def best_classical(
    pipe: Any, run: Run, wanted: Tensor, count: int, steps: int
) -> tuple[LinearSolver, Tensor, int, dict[str, Any]]:
    """The classical solver whose result on one prompt is nearest, its columns' Gram matrix, and what trying cost."""
    scheduler = on_grid(pipe, run, steps)
    names = solver_names(scheduler)
    found: list[tuple[float, str, float, LinearSolver, Tensor]] = []
    for place, power in enumerate(POWERS):
        if place == 2:
            names = [min(found)[1]]
        for name in names:
            solver = linear_form(scheduler, name, warped(steps, count, power))
            finals, gram = finals_of(pipe, solver, [run])
            found.append((float((finals - wanted).square().mean()), name, power, solver, gram))
    _, name, power, solver, gram = min(found, key=lambda one: one[0])
    return solver, gram, len(found) * count, {"solver": name, "power": power}


class Training:
    """Adam on the weights of a solver.

    Args:
        wanted: final latents (P, ...) of the uncached runs.
    """

    def __init__(self, pipe: Any, runs: Sequence[Run], wanted: Tensor, weights: Weights):
        self.pipe, self.runs, self.wanted, self.weights = pipe, runs, wanted, weights
        groups = [{"params": [weights.change], "scale": 1.0}, {"params": [weights.shift], "scale": TIMES_RATE}]
        self.optimiser = torch.optim.Adam(groups, lr=LEARNING_RATE, betas=MOMENTS)
        self.evaluations = 0
        self.history: list[float] = []  # dB of the latents

    def step(self, rows: Sequence[int], rate: float) -> float:
        """One gradient step on some prompts; returns their mean in dB before it."""
        self.optimiser.zero_grad()
        finals, _ = finals_of(self.pipe, self.weights.solver(), [self.runs[row] for row in rows], gradients=True)
        loss = log_errors(finals, self.wanted[list(rows)]).mean()
        loss.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimiser.step()
        self.evaluations += (1 + BACKWARD) * len(self.weights.start) * len(rows)
        return decibels(loss.detach())

    def for_steps(self, count: int, learning_rate: float) -> None:
        """So many steps of one prompt each, after warming up the learning rate, which then falls to 0."""
        order = shuffled(len(self.runs), seed=0)
        for index in tqdm(range(count), desc="learned solver", leave=False, mininterval=1):
            rate = min((index + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * index / count)))
            self.history.append(self.step([next(order)], learning_rate * rate))

    def until_it_stops(self, progress: Path | None) -> None:
        """Batches of prompts until those left out come no nearer; goes on where it was."""
        left_out = max(1, min(MOST_LEFT_OUT, len(self.runs) // 4))
        learned, fallen, waited = len(self.runs) - left_out, 0, 0
        best, state = -math.inf, self._state()
        if progress is not None and progress.exists():
            kept = torch.load(progress, weights_only=True)
            self._restore(kept)
            fallen, waited, best, state = kept["fallen"], kept["waited"], kept["best"], kept["state"]
            self.evaluations, self.history = kept["evaluations"], kept["history"]
        bar = tqdm(desc="learned solver", unit="check", initial=len(self.history), leave=False, mininterval=1)
        while fallen <= FALLS:
            order = shuffled(learned, seed=len(self.history))
            if self.history or best > -math.inf:
                for _ in range(CHECK_EVERY):
                    self.step([next(order) for _ in range(min(BATCH, learned))], LEARNING_RATE * FALL**fallen)
            reached = self._left_out(learned)
            self.history.append(reached)
            waited = 0 if reached > best + GAIN else waited + 1
            if reached > best:
                best, state = reached, self._state()
            if waited >= PATIENCE:
                fallen, waited = fallen + 1, 0
                self._restore(state)
            bar.update()
            bar.set_postfix(dB=f"{reached:.2f}", best=f"{best:.2f}")
            if progress is not None:
                kept = {**self._state(), "fallen": fallen, "waited": waited, "best": best, "state": state}
                buffer = io.BytesIO()
                torch.save({**kept, "evaluations": self.evaluations, "history": self.history}, buffer)
                write_atomically(progress, buffer.getvalue())
        bar.close()
        self._restore(state)

    @torch.no_grad()
    def _left_out(self, first: int) -> float:
        """dB on the prompts from `first` on."""
        logs = []
        for start in range(first, len(self.runs), BATCH):
            rows = slice(start, start + BATCH)
            finals, _ = finals_of(self.pipe, self.weights.solver(), self.runs[rows])
            logs.append(log_errors(finals, self.wanted[rows]))
        self.evaluations += len(self.weights.start) * (len(self.runs) - first)
        return decibels(torch.cat(logs))

    def _state(self) -> dict[str, Any]:
        return copy.deepcopy({"weights": self.weights.state_dict(), "optimiser": self.optimiser.state_dict()})

    def _restore(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Rows of `count` prompts without end, all of them before one comes again."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(range(count), count)
