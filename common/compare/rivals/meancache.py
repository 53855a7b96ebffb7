"""MeanCache (ICLR 2026, arXiv 2601.19961), own implementation: average velocities on a schedule of its own.

A computed step t that is followed by reused ones up to s goes the whole way with an estimate of the average velocity

    u = v_t + (s - t) J,    J = (z_t - z_r - (t - r) v_r) / (t - r)^2

where r is the step `span` steps before t, and v_r what the sampler was given there: J is the derivative of the velocity
along the trajectory, as the average velocity from r to t tells it. Without such a span u is v_t. t, s and r are noise
levels of flow matching. An edge (t, s, span) costs what u leaves of the true average velocity on uncached trajectories;
dynamic programming takes K edges with the least sum of costs to a power, which keeps large ones away.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compare.rivals.base import NotApplicable, Setting
from compare.rivals.fitted import FittedRival
from compare.rivals.linear import on_grid, trajectory
from compare.rivals.runs import together
from ertacache.attach import attached
from ertacache.cache import Cache, Call, Coefficients

SPANS = (0, 1, 2, 3, 4, 5, 6)  # steps from r to t; 0 is plain reuse, and the published schedules go up to 6
POWERS = (1, 2, 3, 5)  # of the costs: the published study goes from 1 to 5
BY_LENGTH = (True, False)  # whether a cost is how far the state is off, or the velocity
TRIED_PROMPTS = 2

Edge = tuple[int, int, int]  # the computed step, the step after its last reused one, the span


class MeanCache(FittedRival):
    """Average velocities from two points of the trajectory, on the schedule of the least powers of their errors."""

    name = "meancache"
    form = "v + (s - t) J over reused steps, J from an earlier point of the trajectory; schedule by dynamic programming"

    def fit(self, pipe: Any, count: int) -> dict[str, Any]:
        scheduler = on_grid(pipe, self.runs[0], self.steps)
        if not hasattr(scheduler, "sigmas") or float(scheduler.sigmas.max()) > 1:
            raise NotApplicable("MeanCache averages the velocities of flow matching, and this scheduler has no sigmas")
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        latents, outputs = trajectory(pipe, self.runs)
        # some models predict data - noise, whose velocity over noise levels has the other sign
        sign = float(((latents[1] - latents[0]) / (sigmas[1] - sigmas[0]) * outputs[0]).sum().sign())
        errors = edge_errors(latents, [sign * output for output in outputs], sigmas)
        schedules = {
            tuple(shortest_path(errors, sigmas, count, power, by_length)) for power in POWERS for by_length in BY_LENGTH
        }
        tried = self.runs[:TRIED_PROMPTS]
        found = []
        for edges in sorted(schedules):
            with playing(pipe, edges, sigmas, sign), torch.no_grad():
                found.append((float((together(tried).float() - latents[-1][: len(tried)]).square().mean()), edges))
        spent = len(self.runs) + len(tried) * len(found) * count / self.steps
        return {"runs": spent, "edges": [list(edge) for edge in min(found)[1]], "sigmas": sigmas, "sign": sign}

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        fitted = self.fitted(pipe, int(setting["num_steps"]))
        with playing(pipe, [tuple(edge) for edge in fitted["edges"]], fitted["sigmas"], fitted["sign"]):
            yield {}


@contextmanager
def playing(pipe: Any, edges: Sequence[Edge], sigmas: Sequence[float], sign: float) -> Iterator[None]:
    """Run the pipeline along the edges; `sign` is -1 for models that predict data - noise."""
    with attached(pipe, lambda _: MeanVelocities(edges, sigmas, sign)):
        yield


class MeanVelocities(Cache):
    """A run along edges, in the sampler's own steps, all those of an edge with the same velocity."""

    def __init__(self, edges: Sequence[Edge], sigmas: Sequence[float], sign: float):
        super().__init__((edge[0] for edge in edges), Coefficients.of_outputs([]))
        self.edges, self.sigmas, self.sign = {edge[0]: edge for edge in edges}, sigmas, sign
        self.states: list[Tensor] = []
        self.given: list[Tensor] = []  # what the sampler was given at each step

    def begin(self, scheduler: Any) -> "MeanVelocities":
        self.end()
        return self

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        self.states.append(call.sample.detach().float().clone())
        if step in self.schedule:
            velocity = self.sign * call.model_output.detach().float()
            self.given.append(average_velocity(self.edges[step], velocity, self.states, self.given, self.sigmas))
        else:
            self.given.append(self.given[-1])
        return (self.sign * self.given[-1]).to(call.model_output.dtype)

    def end(self) -> None:
        self.states, self.given = [], []


def average_velocity(
    edge: Edge, velocity: Tensor, states: Sequence[Tensor], given: Sequence[Tensor], sigmas: Sequence[float]
) -> Tensor:
    """u of an edge, for the velocity at its computed step and what was before.

    Args:
        states: latents up to that step.
        given: velocities before it.
        sigmas: the grid.
    """
    start, end, span = edge
    if not span:
        return velocity
    back, ahead = sigmas[start] - sigmas[start - span], sigmas[end] - sigmas[start]
    slope = (states[start] - states[start - span] - back * given[start - span]) / back**2
    return velocity + ahead * slope


def edge_errors(latents: Sequence[Tensor], outputs: Sequence[Tensor], sigmas: Sequence[float]) -> dict[Edge, float]:
    """Root mean squared error of each edge's velocity along uncached trajectories."""
    errors = {}
    steps = len(outputs)
    for start in range(steps):
        for end in range(start + 1, steps + 1):
            wanted = (latents[end] - latents[start]) / (sigmas[end] - sigmas[start])
            for span in (span for span in SPANS if span <= start and (span == 0 or end > start + 1)):
                found = average_velocity((start, end, span), outputs[start], latents, outputs, sigmas)
                errors[start, end, span] = float((found - wanted).square().mean().sqrt())
    return errors


def shortest_path(
    errors: dict[Edge, float], sigmas: Sequence[float], count: int, power: float, by_length: bool
) -> list[Edge]:
    """The `count` edges from the first place of the grid to the last with the least sum of costs to a power."""
    last = len(sigmas) - 1
    cheapest: dict[tuple[int, int], tuple[float, Edge]] = {}
    for edge, error in errors.items():
        cost = (error * (abs(sigmas[edge[1]] - sigmas[edge[0]]) if by_length else 1.0)) ** power
        cheapest[edge[:2]] = min(cheapest.get(edge[:2], (cost, edge)), (cost, edge))
    paths: dict[int, tuple[float, list[Edge]]] = {0: (0.0, [])}
    for _ in range(count):
        longer: dict[int, tuple[float, list[Edge]]] = {}
        for (start, end), (cost, edge) in cheapest.items():
            if start in paths and (end not in longer or paths[start][0] + cost < longer[end][0]):
                longer[end] = (paths[start][0] + cost, [*paths[start][1], edge])
        paths = longer
    return paths[last][1]
