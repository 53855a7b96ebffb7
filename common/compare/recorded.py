"""Record the uncached runs for studies of the method's parts, and what such parts are compared with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ertacache.cache import Coefficients
from ertacache.calibration import Calibration, check_computed_steps
from ertacache.fit.record import Record
from ertacache.fit.result import bare_calibration, provenance_of
from ertacache.fit.runs import Runs, quiet, record_runs


def recorded_runs(pipe: Any, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Runs:
    """The uncached runs that a calibration starts with; options as for `record_runs`, all others for the pipeline."""
    own = {name: options.pop(name) for name in ("micro_batch", "memory_limit", "progress") if name in options}
    with quiet(pipe), torch.no_grad():
        return record_runs(pipe, prompts, seeds, options, **own)


def plain_calibration(runs: Runs, method: str, **fitted: Any) -> Calibration:
    """A calibration of given parts for recorded runs, without a predicted quality."""
    return replace(bare_calibration(runs.record, method, **fitted), **provenance_of(runs, None, {}))


def uniform_schedule(num_steps: int, computed_steps: int) -> list[int]:
    """K steps spread evenly over the indices, starting at 0."""
    check_computed_steps(num_steps, computed_steps)
    return [i * num_steps // computed_steps for i in range(computed_steps)]


def linear_extrapolation(record: Record, schedule: Sequence[int]) -> Coefficients:
    """Extrapolate the last two computed outputs linearly, over sigma (or timestep without sigmas)."""
    axis = record.sigmas or record.timesteps
    rows: list[list[float]] = []
    last: list[int] = []
    for step in range(record.num_steps):
        last = [step, *last][:2] if step in schedule else last
        slope = 0.0
        if len(last) == 2 and step != last[0]:
            slope = (axis[step] - axis[last[0]]) / (axis[last[0]] - axis[last[1]])
        rows.append([1 + slope, -slope] if slope else [1.0])
    return Coefficients.of_outputs(rows)
