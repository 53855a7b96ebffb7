"""Times the denoising loop of a pipeline step by step, on the device's own time line.

On CUDA the marks are events, which nobody waits for before the loop is over; on a CPU they are readings of the clock,
or of the processor time where one thread does all the work (OMP_NUM_THREADS=1).
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from compare.rivals.base import replaced

Call = Callable[..., Any]  # runs the pipeline; takes callback_on_step_end


@dataclass
class Timings:
    """Seconds of one run.

    Attributes:
        steps: each step of the loop, with everything that the pipeline does in it.
        transformer: of each step, inside the transformer's forward; empty where steps were not split.
        scheduler: of each step, inside scheduler.step and whatever is attached to it; likewise.
    """

    steps: list[float] = field(default_factory=list)
    transformer: list[float] = field(default_factory=list)
    scheduler: list[float] = field(default_factory=list)

    @property
    def loop(self) -> float:
        return sum(self.steps)

    @property
    def pipeline(self) -> list[float]:
        """What each step spends outside the transformer and the scheduler."""
        return [a - b - c for a, b, c in zip(self.steps, self.transformer, self.scheduler, strict=True)]


def clock_of(device: torch.device) -> str:
    """What is read: "device", "wall", or "processor", the time of the one thread that works."""
    if device.type == "cuda":
        return "device"
    return "processor" if torch.get_num_threads() == 1 else "wall"


class Marks:
    """Points in time of one run."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.clock = time.process_time if clock_of(device) == "processor" else time.perf_counter

    def now(self) -> Any:
        if not self.cuda:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; on CUDA only after the device has passed them."""
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


def time_run(pipe: Any, call: Call, device: torch.device, split: bool = True) -> Timings:
    """One run of `call` on `pipe`, with or without something attached to it.

    Args:
        split: time transformer and scheduler too; a compiled transformer would be compiled again for it.
    """
    marks = Marks(device)
    ends: list[Any] = []
    inside: dict[str, list[list[tuple[Any, Any]]]] = {"transformer": [[]], "scheduler": [[]]}

    def step_ends(*_: Any) -> dict[str, Any]:
        ends.append(marks.now())
        for spans in inside.values():
            spans.append([])
        return {}

    parts = ((pipe.transformer, "forward", "transformer"), (pipe.scheduler, "step", "scheduler"))
    with ExitStack() as stack:
        stack.enter_context(_loop_start(pipe, lambda: ends.append(marks.now())))
        for owner, method, name in parts if split else ():
            timed = _timed(getattr(owner, method), marks, inside[name])
            stack.enter_context(replaced(owner, method, timed))
        with torch.no_grad():
            call(callback_on_step_end=step_ends)
    if marks.cuda:
        torch.cuda.synchronize(device)
    steps = [marks.seconds(a, b) for a, b in pairwise(ends)]
    if not split:
        return Timings(steps)
    sums = {
        name: [sum(marks.seconds(a, b) for a, b in step) for step in spans[: len(steps)]]
        for name, spans in inside.items()
    }
    return Timings(steps, **sums)


def _timed(original: Callable[..., Any], marks: Marks, spans: list[list[tuple[Any, Any]]]) -> Callable[..., Any]:
    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = marks.now()
        result = original(*args, **kwargs)
        spans[-1].append((start, marks.now()))
        return result

    return timed


@contextmanager
def _loop_start(pipe: Any, begin: Callable[[], None]) -> Iterator[None]:
    """Calls `begin` where the pipeline opens its progress bar, which encloses the loop over the steps."""
    original = pipe.progress_bar

    def opening(*args: Any, **kwargs: Any) -> Any:
        bar = original(*args, **kwargs)
        begin()
        return bar

    with replaced(pipe, "progress_bar", opening):
        yield


def compare(uncached: list[Timings], cached: list[Timings], computed_steps: list[int]) -> dict[str, Any]:
    """Seconds; a step takes the least of its repeats, since what else a machine does only adds to them.

    `*_seconds` of a loop are sums over its steps, those of a step medians over the steps of a kind, step 0 left out.
    """
    num_steps = len(uncached[0].steps)
    later = range(1, num_steps)
    computed = [i for i in computed_steps if i > 0] or [0]
    reused = [i for i in range(num_steps) if i not in computed_steps]
    slow, fast = sum(_least(uncached, "steps")), sum(_least(cached, "steps"))
    fresh = _median(uncached, "steps", later)
    spared = _median(cached, "steps", reused)
    ideal = num_steps / len(computed_steps)
    found = {
        "num_inference_steps": num_steps,
        "computed_steps": computed_steps,
        "uncached_seconds": slow,
        "cached_seconds": fast,
        "speedup": slow / fast,
        "ideal_speedup": ideal,
        "realised_over_ideal": slow / fast / ideal,
        "uncached_step_seconds": fresh,
        "computed_step_seconds": _median(cached, "steps", computed),
        "reused_step_seconds": spared,
        "reused_percent_of_computed": 100 * spared / fresh,
        "repeats": len(cached),
    }
    if not uncached[0].transformer:
        return found
    return found | {
        "transformer_percent": 100 * _median(uncached, "transformer", later) / fresh,
        "scheduler_percent": 100 * _median(uncached, "scheduler", later) / fresh,
        "pipeline_percent": 100 * _median(uncached, "pipeline", later) / fresh,
        # of a reused step: the scheduler with the cache attached to it, and the rest of the pipeline's loop
        "reused_scheduler_and_cache_seconds": _median(cached, "scheduler", reused),
        "reused_pipeline_seconds": _median(cached, "pipeline", reused),
        "uncached_scheduler_seconds": _median(uncached, "scheduler", later),
    }


def _least(runs: list[Timings], part: str) -> list[float]:
    """Of each step, over the repeats."""
    return [min(values) for values in zip(*(getattr(run, part) for run in runs), strict=True)]


def _median(runs: list[Timings], part: str, steps: Sequence[int]) -> float:
    values = _least(runs, part)
    return statistics.median(values[i] for i in steps) if steps else 0.0
