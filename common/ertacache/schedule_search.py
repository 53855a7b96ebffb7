"""Our choice of the computed steps: paths weighted by how errors grow, tried for real, then a swap search."""

import numpy as np
import torch

from ertacache import policy
from ertacache.arrays import Array
from ertacache.fitting import SAFE_FORM, Form
from ertacache.paths import path_schedule
from ertacache.recording import gram_matrix
from ertacache.rectification import Coefficients
from ertacache.rerun import Rerun
from ertacache.runs import Runs

GROWTH_PLACES = 6  # steps at which the growth of an error is measured, the first and the last but one among them
GROWTH_PROMPTS = 4
CHOOSING_PROMPTS = 64  # prompts, at most, that schedules and forms are chosen on
OUTPUT_NUDGES = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # of an output, relative to its change
WEIGHT_POWERS = (0.0, 1.0, 2.0)  # of the growth, in the weights of squared errors


def choose_schedule(
    runs: Runs,
    computed_steps: int,
    budget: int,
    growth: Array | None,
    form: Form = SAFE_FORM,
) -> list[int]:
    """The K computed steps for rectified reuse.

    Args:
        runs: recorded calibration runs, or the first of them.
        budget: schedules whose error may be measured.
        growth: of `error_growth`; needed where there is a budget. With none, errors weigh the same wherever they arise.
        form: what a step combines; a schedule is judged by the true error of the step-by-step fit of that form, which
            takes K evaluations a prompt.
    """
    recorded = runs.recorded
    gram, gains = gram_matrix([o[: len(runs)] for o in recorded.outputs]), np.asarray(recorded.gains)
    if budget == 0 or growth is None:
        return path_schedule(gram, gains, computed_steps, form.outputs)
    measured: dict[tuple[int, ...], float] = {}

    def measure(schedule: list[int]) -> float:
        key = tuple(schedule)
        if key not in measured:
            measured[key] = runs.fitted_error(schedule, form)
        return measured[key]

    candidates = [path_schedule(gram, gains, computed_steps, form.outputs, growth**p) for p in WEIGHT_POWERS]
    best = min(candidates[:budget], key=measure)
    return policy.swap_search(best, measure, recorded.num_steps, max(0, budget - len(measured)))


def growth_places(num_steps: int) -> list[int]:
    """The steps at which `error_growth` measures: evenly spread from the first to the last but one."""
    return sorted({round(i * (num_steps - 2) / (GROWTH_PLACES - 1)) for i in range(GROWTH_PLACES)} - {num_steps - 1})


def growth_evaluations(num_steps: int, prompts: int) -> int:
    """Transformer evaluations that `error_growth` takes, over all prompts."""
    return sum(num_steps - 1 - place for place in growth_places(num_steps)) * min(GROWTH_PROMPTS, prompts)


def error_growth(runs: Runs) -> Array:
    """How many times larger an error after step k is at the end, (N,): geometric mean over a few prompts.

    Measured by pushing the output of step k along its change since the step before, the direction in which reuse
    errs, and making the rest of the uncached run again; in between interpolated.
    """
    recorded, few = runs.recorded, runs.first(GROWTH_PROMPTS)
    rows = slice(len(few))
    steps = list(range(recorded.num_steps))
    places, logs = [], []
    for place in growth_places(recorded.num_steps):
        output = recorded.outputs[place][rows].float()
        before = recorded.outputs[place - 1][rows].float() if place else torch.zeros_like(output)
        nudge = OUTPUT_NUDGES.get(recorded.latents[0].dtype, OUTPUT_NUDGES[torch.float32])
        coefficients = [[1.0]] * recorded.num_steps
        coefficients[place] = [1 + nudge, -nudge] if place else [1 + nudge]
        moved = few.run(
            Rerun(steps, Coefficients.of_outputs(coefficients), [o[rows] for o in recorded.outputs[: place + 1]])
        )
        push = nudge * abs(recorded.gains[place]) * (output - before).flatten(1).norm(dim=1)
        ratio = (moved - recorded.latents[-1][rows].float()).flatten(1).norm(dim=1) / push.clamp_min(1e-12)
        places.append(place)
        logs.append(float(ratio.clamp_min(1e-6).log().mean()))
    return np.exp(np.interp(steps, places, logs))
