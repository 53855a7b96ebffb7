"""BudCache (ICML 2026, arXiv 2606.13496), own implementation: a searched schedule, then learned noise levels on it.

Reused steps add the residual of all blocks from the last computed step. Stage 1 searches the K computed steps whose
final latents are nearest to the uncached ones, by simulated annealing and then hill climbing, with the first K / 4
steps computed. Stage 2 learns all noise levels of the run on that schedule by back-propagation, monotone by a softmax
of their gaps; it is for solvers that make Euler steps, and kept where it is nearer on prompts left out of it.
Iterations, temperatures and moves are the published ones.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compare.rivals.base import Clock, Run, Setting, watch
from compare.rivals.fitted import FittedRival
from compare.rivals.linear import driven, on_grid
from compare.rivals.multistep import is_flow, velocity_sign
from compare.rivals.runs import together
from compare.rivals.stack import intercepted

SEARCH_PROMPTS = 2
ANNEALING, HOTTEST, COLDEST = 200, 0.05, 1e-5  # steps, and temperatures in units of the mean squared error
CLIMBS, WINDOW, JUMPS = 20, 3, 2  # rounds; how far a computed step moves; further random places for each of them
MOST_PROMPTS = 100  # of stage 2
LEFT_OUT = 8  # of them, on which stage 2 is judged
BATCH = 8  # prompts in a gradient step
LEARNING_RATE, WARM_UP = 2e-2, 0.05
BACKWARD = 2  # evaluations that a backward pass counts as

Schedule = tuple[int, ...]


class BudCache(FittedRival):
    """A searched schedule with reuse of the residual, on learned noise levels."""

    name = "budcache"
    form = "residual of all blocks reused on a schedule searched by annealing, then learned noise levels"
    prompts = MOST_PROMPTS
    optional = True  # several hundred uncached runs for each number of steps

    def fit(self, pipe: Any, count: int) -> dict[str, Any]:
        runs = self.runs[:MOST_PROMPTS]
        with torch.no_grad():
            wanted = torch.cat([together(some).float() for some in _parts(runs)])
        evaluations = self.steps * len(runs)

        def error(schedule: Schedule) -> float:
            with playing(pipe, schedule), torch.no_grad():
                made = together(runs[:SEARCH_PROMPTS]).float()
            return float((made - wanted[: len(made)]).square().mean())

        schedule, searched = search(error, self.steps, count)
        evaluations += searched * count * min(SEARCH_PROMPTS, len(runs))
        fitted: dict[str, Any] = {"steps": list(schedule), "sigmas": None, "searched": searched}
        scheduler = on_grid(pipe, runs[0], self.steps)
        if is_flow(scheduler) and len(runs) > LEFT_OUT:
            sigmas, spent = learn_sigmas(pipe, schedule, scheduler, runs, wanted)
            evaluations += spent
            fitted["sigmas"] = sigmas
        return {**fitted, "runs": evaluations / self.steps}

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        fitted = self.fitted(pipe, int(setting["num_steps"]))
        sigmas = None if fitted["sigmas"] is None else torch.tensor(fitted["sigmas"])
        with playing(pipe, fitted["steps"], sigmas):
            yield {}


class ScheduledResidual:
    """Observer of the block stack: computes on a schedule, and adds the last residual elsewhere."""

    def __init__(self, schedule: Sequence[int]):
        self.schedule = frozenset(schedule)
        self.clock = Clock()
        self.residuals: dict[str, Tensor] = {}  # by guidance branch

    def enter(self, arguments: dict[str, Any]) -> Tensor | None:
        if self.clock.step in self.schedule:
            return None
        return arguments["hidden_states"] + self.residuals[self.clock.branch]

    def leave(self, hidden_in: Tensor, hidden_out: Tensor) -> None:
        self.residuals[self.clock.branch] = hidden_out - hidden_in


class EulerSteps:
    """Euler steps along noise levels, which may carry a graph."""

    def __init__(self, scheduler: Any, sigmas: Tensor):
        self.sigmas, self.sign = sigmas, velocity_sign(scheduler)
        self.times = sigmas[:-1] * (float(scheduler.timesteps[0]) / float(scheduler.sigmas[0]))

    def step(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        length = self.sign * (self.sigmas[index + 1] - self.sigmas[index])
        return (sample.float() + length.to(sample.device) * output.float()).to(sample.dtype)


@contextmanager
def playing(
    pipe: Any, schedule: Sequence[int], sigmas: Tensor | None = None, gradients: bool = False
) -> Iterator[None]:
    """Run the pipeline on a schedule, and on other noise levels than its scheduler's where they are given."""
    residual = ScheduledResidual(schedule)
    with ExitStack() as stack:
        if sigmas is not None:
            stack.enter_context(driven(pipe, lambda scheduler: EulerSteps(scheduler, sigmas), gradients))
        residual.clock = stack.enter_context(watch(pipe, residual.residuals.clear))
        stack.enter_context(intercepted(pipe.transformer, residual))
        yield


# -- stage 1 -------------------------------------------------------------------------------------------------


def search(error: Callable[[Schedule], float], steps: int, count: int, seed: int = 0) -> tuple[Schedule, int]:
    """The best schedule found, and how many were tried; `error` is asked once for each."""
    draw = random.Random(seed)
    known: dict[Schedule, float] = {}
    bar = tqdm(desc=f"budcache {count}", unit="schedule", leave=False, mininterval=1)

    def tried(schedule: Schedule) -> float:
        if schedule not in known:
            known[schedule] = error(schedule)
            bar.update()
        return known[schedule]

    fixed = max(1, count // 4)  # first steps that are always computed
    current: Schedule = (*range(fixed), *sorted(draw.sample(range(fixed, steps), count - fixed)))
    tried(current)
    for step in range(ANNEALING):
        heat = HOTTEST * (COLDEST / HOTTEST) ** (step / ANNEALING)
        other = _moved(current, steps, fixed, draw)
        worse = tried(other) - tried(current)
        if worse < 0 or draw.random() < math.exp(-worse / heat):
            current = other
    for _ in range(CLIMBS):
        best = min(_neighbours(current, steps, fixed, draw), key=tried, default=current)
        if tried(best) >= tried(current):
            break
        current = best
    bar.close()
    return min(known, key=lambda schedule: known[schedule]), len(known)


def _moved(schedule: Schedule, steps: int, fixed: int, draw: random.Random) -> Schedule:
    """One computed step moved, mostly not far, or now and then two."""
    movable = [step for step in schedule if step >= fixed]
    free = [step for step in range(fixed, steps) if step not in schedule]
    if not movable or not free:
        return schedule
    if draw.random() < 0.9 or len(movable) < 2 or len(free) < 2:
        taken = [draw.choice(movable)]
        near = [step for step in free if abs(step - taken[0]) <= WINDOW]
        put = [draw.choice(near if near and draw.random() < 0.7 else free)]
    else:
        taken, put = draw.sample(movable, 2), draw.sample(free, 2)
    return tuple(sorted({*schedule} - {*taken} | {*put}))


def _neighbours(schedule: Schedule, steps: int, fixed: int, draw: random.Random) -> list[Schedule]:
    """All with one computed step moved within a window, and some with one moved anywhere."""
    found: dict[Schedule, None] = {}  # in the order that they were found in
    for step in (step for step in schedule if step >= fixed):
        near = range(max(fixed, step - WINDOW), min(steps - 1, step + WINDOW) + 1)
        for place in [*near, *(draw.randrange(fixed, steps) for _ in range(JUMPS))]:
            if place not in schedule:
                found[tuple(sorted({*schedule} - {step} | {place}))] = None
    return list(found)


# -- stage 2 -------------------------------------------------------------------------------------------------


def learn_sigmas(
    pipe: Any, schedule: Schedule, scheduler: Any, runs: Sequence[Run], wanted: Tensor
) -> tuple[list[float] | None, int]:
    """Noise levels learned on one pass over the prompts, and the evaluations spent; None where they gain nothing."""
    first = torch.as_tensor(scheduler.sigmas).float().cpu()
    gaps = nn.Parameter((first[:-1] - first[1:]).clamp_min(1e-8).log())

    def sigmas() -> Tensor:
        below = torch.cat([torch.zeros(1), gaps.softmax(0).cumsum(0)])
        return first[0] - (first[0] - first[-1]) * below

    def errors(levels: Tensor, rows: range, gradients: bool = False) -> Tensor:
        with playing(pipe, schedule, levels, gradients):
            made = together(runs[rows.start : rows.stop]).float()
        return (made - wanted[rows.start : rows.stop]).square().flatten(1).mean(1)

    learned = len(runs) - LEFT_OUT
    starts = range(0, learned, BATCH)
    optimiser = torch.optim.AdamW([gaps], lr=LEARNING_RATE, weight_decay=0.0)
    for index, start in enumerate(starts):
        progress = (index + 1) / len(starts)
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(
            progress / WARM_UP, 0.5 * (1 + math.cos(math.pi * index / len(starts)))
        )
        optimiser.zero_grad()
        errors(sigmas(), range(start, min(start + BATCH, learned)), gradients=True).mean().backward()
        nn.utils.clip_grad_norm_([gaps], 1.0)
        optimiser.step()
    left = range(learned, len(runs))
    with torch.no_grad():
        nearer = errors(sigmas(), left).log().mean() < errors(first, left).log().mean()
    spent = len(schedule) * ((1 + BACKWARD) * learned + 2 * LEFT_OUT)
    return (sigmas().tolist() if nearer else None), spent


def _parts(runs: Sequence[Run]) -> list[Sequence[Run]]:
    return [runs[start : start + BATCH] for start in range(0, len(runs), BATCH)]
