"""How the cost of calibrating grows: with the number of steps N, with prompts, resolution and frames.

    python bench/scaling.py
    python bench/scaling.py --steps 10 20 --factors 1 2

Runs on a pipeline whose transformer is a formula, so that what is timed is the calibration itself: recording, Gram
matrix, the search for the schedule that `calibrate` makes, fitting. The transformer's share is (N + (1 + F) K) P
evaluations on top.
With OMP_NUM_THREADS=1 the times are those of the processor, which other work on the machine leaves alone.
Writes bench/results/scaling.json; `growth` are exponents: time grows as the varied number to that power.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from closed_form import ClosedFormPipeline
from record import RESULTS, machine, write
from step_timer import Marks, clock_of

from compare.recorded import recorded_runs
from ertacache.fit.record import gram_matrix
from ertacache.fit.runs import Runs, quiet
from ertacache.fit.schedule import path_schedule
from ertacache.fit.step_by_step import OUTPUTS, fit_step_by_step

CPU = torch.device("cpu")
STEPS = (10, 20, 50, 100, 200, 500, 1000)
FACTORS = (1, 2, 4, 8, 16)
BASE = {"prompts": 2, "frames": 1, "side": 32}  # while N varies; latents (prompts, 4, frames, side, side)
SIZED = {"prompts": 2, "frames": 2, "side": 64}  # from which prompts, area and frames grow, at SIZED_STEPS
SIZED_STEPS = 28
REPEATS = 3
STAGES = ("record", "gram", "policy", "fit")


def stages(num_steps: int, prompts: int, frames: int, side: int) -> dict[str, float]:
    """Seconds of each stage of a calibration with K = N / 2, the smallest of REPEATS."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(REPEATS):
        pipe = ClosedFormPipeline(frames, side)
        names, seeds = [str(i) for i in range(prompts)], range(prompts)
        seconds, runs = _timed(
            lambda pipe=pipe, names=names, seeds=seeds: recorded_runs(
                pipe, names, seeds=seeds, num_inference_steps=num_steps
            )
        )
        found["record"].append(seconds)
        seconds, gram = _timed(lambda runs=runs: gram_matrix(runs.record.outputs))
        found["gram"].append(seconds)
        gains = np.asarray(runs.record.gains)
        seconds, schedule = _timed(
            lambda gram=gram, gains=gains: path_schedule(gram, gains, max(1, num_steps // 2), OUTPUTS)
        )
        found["policy"].append(seconds)
        found["fit"].append(_timed(lambda runs=runs, schedule=schedule: _fit(runs, schedule))[0])
    return {stage: min(values) for stage, values in found.items()}


def _fit(runs: Runs, schedule: list[int]) -> None:
    with quiet(runs.pipe), torch.no_grad():
        fit_step_by_step(runs, schedule)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    marks = Marks(CPU)
    start = marks.now()
    result = work()
    return marks.seconds(start, marks.now()), result


def growth(numbers: list[float], seconds: list[float]) -> float:
    """The exponent p of seconds ~ number^p between the largest numbers: median of the slopes of the last three."""
    x, y = np.log(numbers[-4:]), np.log(seconds[-4:])
    return float(statistics.median(np.diff(y) / np.diff(x)))


def series(varied: str, numbers: list[int], measured: list[dict[str, float]]) -> dict[str, Any]:
    """Times of every stage over the varied number, and the exponents of their growth."""
    times = {stage: [one[stage] for one in measured] for stage in STAGES}
    exponents = {stage: growth(numbers, values) for stage, values in times.items()} if len(numbers) > 1 else {}
    return {"varied": varied, "numbers": numbers, "seconds": times, "growth": exponents}


def measure(steps: list[int], factors: list[int]) -> list[dict[str, Any]]:
    """One series for N, prompts, area and frames each."""
    found = [series("steps", steps, [stages(n, **BASE) for n in _said("steps", steps)])]
    for name in ("prompts", "frames"):
        sizes = [{**SIZED, name: SIZED[name] * factor} for factor in factors]
        found.append(series(name, [s[name] for s in sizes], [stages(SIZED_STEPS, **s) for s in _said(name, sizes)]))
    sides = [round(SIZED["side"] * factor**0.5) for factor in factors]
    sizes = [{**SIZED, "side": side} for side in sides]
    areas = [side * side for side in sides]
    found.append(series("area", areas, [stages(SIZED_STEPS, **s) for s in _said("area", sizes)]))
    return found


def _said(name: str, values: list[Any]) -> list[Any]:
    print(f"{name}: {values}", file=sys.stderr)
    return values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--factors", type=int, nargs="+", default=list(FACTORS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    record = {
        "model": "a formula in place of the transformer",
        "base": BASE,
        "sized": {**SIZED, "steps": SIZED_STEPS},
        "series": measure(options.steps, options.factors),
        "clock": clock_of(CPU),
        **machine(CPU, torch.float32),
    }
    write("scaling", record, options.out)


if __name__ == "__main__":
    main()
