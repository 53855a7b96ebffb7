"""The method at run time: which steps call the model, and what the scheduler gets on every step.

    history = []                                       # computed outputs, newest first
    for i in range(N):
        if i in schedule:
            history.insert(0, model(x, sigma[i]))
        v = sum(a * o for a, o in zip(coefficients[i], history)) + b[i] * x
        x = scheduler.step(v, x)

`Cache` is that loop seen from inside a pipeline, which owns x, the model and the scheduler (attach.py).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ertacache.channels import ChannelMatrices, StepChannels, add_channels
from ertacache.errors import StateError


class Row(NamedTuple):
    """What one step combines.

    Attributes:
        outputs: a_j of the computed outputs, newest first.
        latents: b of the latents that the step starts from.
        channels: matrices M_j of the channels, which add to the a_j; None for none.
    """

    outputs: list[float]
    latents: float = 0.0
    channels: StepChannels | None = None


PLAIN = Row([1.0])  # the newest output as it is


@dataclass(frozen=True)
class Coefficients:
    """What every step of a run combines; step i's lists may be shorter than the history.

    Attributes:
        outputs: for each step the a_j.
        latents: for each step b.
        channels: for each step the M_j, of calibrations that have them.
        streams: those of further schedulers that the run steps.
    """

    outputs: list[list[float]]
    latents: list[float]
    channels: ChannelMatrices | None = None
    streams: tuple["Coefficients", ...] = ()

    @classmethod
    def of_outputs(cls, outputs: list[list[float]]) -> "Coefficients":
        """Those of computed outputs alone."""
        return cls(outputs, [0.0] * len(outputs))

    @property
    def longest(self) -> int:
        """Outputs that a run keeps, at least 1."""
        return max(map(len, self.outputs), default=1)

    def rows(self, device: torch.device) -> list[Row]:
        """A `Row` a step, with its tensors on the device; copies to it, so it belongs before the sampling loop."""
        channels = self.channels.on(device) if self.channels else [None] * len(self.outputs)
        return [Row(*row) for row in zip(self.outputs, self.latents, channels, strict=True)]


class Call(Protocol):
    """What the cache reads of a scheduler's step, or of a bare model's call."""

    @property
    def model_output(self) -> Tensor:
        """The model's output, after guidance; a placeholder on a reused step."""

    @property
    def sample(self) -> Tensor:
        """The latents that the step starts from."""


class Cache:
    """Play a schedule: keep the model's output on a computed step, return on every step what the scheduler gets.

    Args:
        schedule: the computed steps.
        coefficients: what each step combines.
    """

    def __init__(self, schedule: Iterable[int], coefficients: Coefficients):
        self.schedule, self.coefficients = frozenset(schedule), coefficients
        self.rows: list[Row] = []
        self.history: deque[Tensor] = deque(maxlen=coefficients.longest)
        # of further schedulers
        self.streams: list[Cache] = [Cache(self.schedule, stream) for stream in coefficients.streams]

    def begin(self, scheduler: Any) -> "Cache":
        """Begin a run on a scheduler whose grid is set, and return the cache that plays it."""
        return self.start(torch.as_tensor(scheduler.timesteps).device)  # where the latents will be too

    def start(self, device: torch.device) -> "Cache":
        """Begin a run whose latents are on a device; whatever is copied to it is copied here."""
        self.rows = self.coefficients.rows(device)
        self.history.clear()
        for stream in self.streams:
            stream.start(device)
        return self

    def computes(self, step: int) -> bool:
        """Whether the model runs at this step."""
        return step in self.schedule

    def stream(self, index: int) -> "Cache":
        """The cache of one of the schedulers that a run steps; 0 for the first, which is this one."""
        if index > len(self.streams):
            raise StateError(
                f"the pipeline steps scheduler {index + 1}, the calibration is for {len(self.streams) + 1}: calibrate "
                "again (ertacache.calibrate)"
            )
        return self.streams[index - 1] if index else self

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        """The output that the scheduler gets at this step, in the model output's dtype."""
        if step in self.schedule:
            # a clone: the loop may write into its tensor, and a CUDA graph writes every output to the same place
            self.history.appendleft(call.model_output.detach().clone(memory_format=torch.contiguous_format))
        return combine(self.history, self.row(step, call, scheduler), call.sample)

    def row(self, step: int, call: Call, scheduler: Any) -> Row:
        """What this step combines; fitting overrides it."""
        return self.rows[step]

    def end(self) -> None:
        """Drop the run's tensors."""
        self.history.clear()


def combine(outputs: Sequence[Tensor], row: Row, latents: Tensor) -> Tensor:
    """sum_j (a_j o_j + M_j^T o_j) + b x, computed in float32, in the dtype of the newest output.

    Args:
        outputs: computed outputs, newest first, all of one shape; at least one.
        latents: x, in the shape of an output; not read where b is 0.
    """
    newest = outputs[0]
    if row == PLAIN:
        return newest.clone()  # schedulers may write into what they are given
    # what .float() returns may be the cached output itself, which must not be written to
    total = newest * row.outputs[0] if newest.dtype == torch.float32 else newest.float().mul_(row.outputs[0])
    for index in range(1, min(len(outputs), len(row.outputs))):
        total.add_(outputs[index], alpha=row.outputs[index])
    if row.channels is not None:
        add_channels(total, outputs, row.channels)
    if row.latents:
        total.add_(latents, alpha=row.latents)
    return total.to(newest.dtype)
