"""Record the uncached runs for studies of the method's parts, and make calibrations of such parts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ertacache.calibration import Calibration
from ertacache.fit.recipe import bare_calibration, provenance_of
from ertacache.fit.runs import Runs, quiet, record_runs


def recorded_runs(pipe: Any, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Runs:
    """The uncached runs that a calibration starts with; options as for `record_runs`, all others for the pipeline."""
    own = {name: options.pop(name) for name in ("micro_batch", "memory_limit", "progress") if name in options}
    with quiet(pipe), torch.no_grad():
        return record_runs(pipe, prompts, seeds, options, **own)


def plain_calibration(runs: Runs, method: str, **fitted: Any) -> Calibration:
    """A calibration of given parts for recorded runs, without a predicted quality."""
    return replace(bare_calibration(runs.record, method, **fitted), **provenance_of(runs, None, {}))
