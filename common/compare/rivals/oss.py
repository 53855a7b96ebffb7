"""An optimised step grid: K of the N steps by dynamic programming, then a stock solver on them.

The form of OSS (optimal stepsize for diffusion sampling), own implementation. For every step of the grid the best path
of first-order steps that leads there is kept, with its latents, and one more evaluation at each place extends all of
them; the distance to the uncached latents there decides. Such a round is one run over the grid whose latents are
prescribed. The distance is a mean over the calibration prompts, so that they share one grid. With flow matching a
second grid is made of Adams-Bashforth steps of second order. Which grid is taken, and which stock solver runs on it,
is decided on the same prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compare.rivals.base import Run
from compare.rivals.fitted import LinearRival
from compare.rivals.linear import OWN, driven, linear_form, on_grid, solver_names, trajectory
from compare.rivals.multistep import ADAMS_BASHFORTH
from compare.rivals.runs import batches, together

PROMPTS = 2  # whose trajectories the grid is chosen on


class OptimisedSteps(LinearRival):
    """Steps chosen by dynamic programming over uncached trajectories."""

    name = "oss"
    form = "K of the N steps, by dynamic programming over uncached trajectories, and a stock solver on them"

    def fit(self, pipe: Any, count: int) -> dict[str, Any]:
        runs = self.runs[:PROMPTS]
        latents, outputs = trajectory(pipe, runs)
        scheduler = on_grid(pipe, runs[0], self.steps)
        names = solver_names(scheduler)
        keep, add = first_order(scheduler)
        grids = [(best_path(pipe, runs, keep, add, latents, outputs[0], count), names)]
        if ADAMS_BASHFORTH in names:
            second = best_path(pipe, runs, keep, add, latents, outputs[0], count, order=2)
            grids.append((second, [ADAMS_BASHFORTH]))
        found = []
        for steps, name in ((steps, name) for steps, some in grids for name in some):
            solver = linear_form(scheduler, name, steps)
            with solver.played(pipe) as overrides, torch.no_grad():
                error = (together(runs, **overrides).float() - latents[-1]).square().mean()
            found.append((float(error), name, steps, solver))
        _, name, steps, solver = min(found, key=lambda one: one[0])
        # the trajectory, for each grid a run a further step, and the solvers
        spent = len(runs) * (1 + len(grids) * (count - 1) + len(found) * count / self.steps)
        return {"runs": spent, "steps": steps, "stock": name, "solver": solver.to_dict()}


def first_order(scheduler: Any) -> tuple[Tensor, Tensor]:
    """a, b (N, N + 1) of the steps of first order from place i of the grid to place j > i: x_j = a x_i + b o_i."""
    steps = len(scheduler.timesteps)
    name = OWN if hasattr(scheduler, "sigmas") else solver_names(scheduler)[0]
    keep, add = torch.zeros(steps, steps + 1), torch.zeros(steps, steps + 1)
    for start in range(steps):
        for end in range(start + 1, steps + 1):
            form = linear_form(scheduler, name, [start, end] if end < steps else [start], order=1)
            keep[start, end], add[start, end] = form.noise[0], form.outputs[0, 0]
    return keep, add


def best_path(
    pipe: Any,
    runs: Sequence[Run],
    keep: Tensor,
    add: Tensor,
    teacher: list[Tensor],
    first: Tensor,
    count: int,
    order: int = 1,
) -> list[int]:
    """The `count` steps, 0 among them, whose path ends nearest to the uncached latents.

    Args:
        keep, add: see `first_order`.
        teacher: x_0 .. x_N of the uncached runs.
        first: their outputs at step 0.
        order: of the steps; 2 is the rule of Adams and Bashforth, for flow matching.
    """
    last = len(teacher) - 1
    paths: dict[int, list[int]] = {0: []}  # place -> the steps that lead there
    latents = [teacher[0]] * last
    outputs = before = [first] * last  # at each place, and at the step before it on its path
    for done in range(count):
        if done:
            outputs = outputs_at(pipe, runs, latents)
        # as many places must be left as steps are still to be taken; the last step ends at the end
        ends = range(done + 1, last - (count - done) + 2) if done < count - 1 else [last]
        reached: dict[int, tuple[float, list[int], Tensor, Tensor]] = {}
        for end in ends:
            for start in (place for place in paths if place < end):
                slope = outputs[start]
                if order == 2 and done:
                    ratio = add[start, end] / add[paths[start][-1], start]
                    slope = slope + 0.5 * ratio * (slope - before[start])
                moved = keep[start, end] * latents[start] + add[start, end] * slope
                error = float((moved - teacher[end]).square().mean())
                if end not in reached or error < reached[end][0]:
                    reached[end] = (error, [*paths[start], start], moved, outputs[start])
        paths = {end: found[1] for end, found in reached.items()}
        latents = [reached[place][2] if place in reached else teacher[place] for place in range(last)]
        before = [reached[place][3] if place in reached else first for place in range(last)]
        if done == count - 1:
            return paths[last]
    raise AssertionError  # a count of at least one has returned


@torch.no_grad()
def outputs_at(pipe: Any, runs: Sequence[Run], latents: list[Tensor]) -> list[Tensor]:
    """Guided outputs at every step of the grid, each for latents (P, ...) of its own: one run in evaluations.

    The first step's latents are the initial ones, whatever is given.
    """
    parts = []
    for rows in batches(runs):
        prescribed = Prescribed([one[rows] for one in latents])
        with driven(pipe, lambda _, steps=prescribed: steps):  # type: ignore[misc]
            together(runs[rows])
        parts.append(prescribed.outputs)
    return [torch.cat(same) for same in zip(*parts, strict=True)]


class Prescribed:
    """The steps of a run that starts each of them from given latents, and keeps the outputs there."""

    times = None

    def __init__(self, latents: list[Tensor]):
        self.latents = latents
        self.outputs: list[Tensor] = []

    def step(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        self.outputs.append(output.float())
        return self.latents[index + 1].to(sample.dtype) if index + 1 < len(self.latents) else sample
