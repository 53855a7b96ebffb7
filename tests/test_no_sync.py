"""No step of a cached run waits for the device: the library's code reads no tensor's value inside the loop.

A read (item, float(), tolist, a copy to the host, a condition on a tensor) makes the host wait for a GPU. Reads that
pipelines and schedulers make are theirs.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import KINDS, made
from torch import Tensor

import ertacache
from compare.rivals.base import replaced
from ertacache.attach import attached
from ertacache.fit.record import Recording
from ertacache.fit.step_by_step import StepFit

LIBRARY = str(Path(ertacache.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
READS = (
    *("item", "tolist", "numpy", "cpu", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__"),
    *("__array__", "__contains__", "unique", "masked_select"),
)


@dataclass
class Seen:
    """Where the library read a tensor: while steps were left to make, and after the last one."""

    inside: list[str] = field(default_factory=list)
    at_end: list[str] = field(default_factory=list)


@contextmanager
def reads_by_the_library(pipe: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Reads between the first step and the end of the loop; a timestep of the grid on the host is no device's."""
    seen, made_steps, in_loop = Seen(), [0], [False]

    def watch(name: str) -> None:
        original = getattr(Tensor, name)

        @functools.wraps(original)
        def reading(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            place = frame.f_code.co_filename
            if in_loop[0] and place.startswith(LIBRARY) and not _is_of(self, pipe.scheduler.timesteps):
                (seen.inside if made_steps[0] < steps else seen.at_end).append(f"{name} in {place}:{frame.f_lineno}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, reading)

    bar, reset, step = pipe.progress_bar, pipe.scheduler.set_timesteps, pipe.scheduler.step

    @functools.wraps(bar)
    def opening(*args: Any, **kwargs: Any) -> Any:
        in_loop[0] = True
        return bar(*args, **kwargs)

    @functools.wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        made_steps[0] += 1
        return result

    @functools.wraps(reset)
    def setting(*args: Any, **kwargs: Any) -> Any:
        in_loop[0] = False
        return reset(*args, **kwargs)

    for name in READS:
        watch(name)
    with (
        replaced(pipe, "progress_bar", opening),
        replaced(pipe.scheduler, "step", stepping),
        replaced(pipe.scheduler, "set_timesteps", setting),
    ):
        yield seen
    monkeypatch.undo()


def _is_of(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor lies in another one's memory; a timestep is checked where that costs nothing."""
    return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("kind", "guidance"), [*((kind, True) for kind in KINDS), *((kind, False) for kind in KINDS if kind != "flux")]
)
def test_the_library_reads_no_tensor_inside_the_loop(kind, guidance, monkeypatch):
    pipe, call, calibration, _ = made(kind, guidance=guidance)
    steps = calibration.num_inference_steps
    # the scheduler's own step is counted, so the cache is attached around the counter
    with reads_by_the_library(pipe, steps, monkeypatch) as seen, ertacache.apply(pipe, calibration) as applied:
        call()
    assert applied.reused_calls >= 4
    assert seen.inside == []
    assert len(seen.at_end) <= 1  # whether the run stayed finite is looked at once, when all work is queued


def test_reads_would_be_seen(monkeypatch):
    """Fitting does read: its coefficients are solved for on the host."""
    pipe, call, calibration, _ = made("flux")
    recording = Recording()
    with attached(pipe, recording.begin, stepped=recording.stepped):
        call()
    fit, steps = StepFit(calibration.computed_steps, recording.latents), calibration.num_inference_steps
    with reads_by_the_library(pipe, steps, monkeypatch) as seen, attached(pipe, fit.begin):
        call()
    assert any("item" in place for place in seen.inside)


@pytest.mark.parametrize("kind", KINDS)
def test_a_timestep_on_a_device_is_not_looked_at(kind):
    """Timesteps on the meta device have no value: reading one raises."""
    pipe, call, calibration, _ = made(kind)
    steps = []
    with ertacache.apply(pipe, calibration):
        expected = call()[0]
        original = pipe.scheduler.step
        signature = inspect.signature(original)

        @functools.wraps(original)
        def on_meta(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if steps:  # at the first step a scheduler may look its place in the grid up
                bound.arguments["timestep"] = torch.empty((), device="meta")
            steps.append(1)
            return original(*bound.args, **bound.kwargs)

        with replaced(pipe.scheduler, "step", on_meta):
            assert torch.equal(call()[0], expected)
    assert len(steps) == calibration.num_inference_steps
