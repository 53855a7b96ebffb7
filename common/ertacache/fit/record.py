"""Stage 1: record the uncached runs of all calibration prompts in lockstep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ertacache.cache import Cache, Call, Coefficients
from ertacache.errors import CalibrationError
from ertacache.fit.store import TrajectoryStore
from ertacache.solver import affine_step, host_grid, is_affine, takes_timesteps

Array = NDArray[np.float64]  # what the host computes with, whatever dtype a run has
GRAM_VALUES = 2**23  # float64 values that the Gram matrix works on at a time: 64 MiB, whatever the trajectories


class Rows(Sequence[Tensor]):
    """Some rows of each of several tensors, taken when one is read, so that a subset needs no memory."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[int]):
        self.tensors, self.rows = tensors, list(rows)
        first, last = min(self.rows, default=0), max(self.rows, default=-1)
        # neighbours are a view, anything else a copy
        self.index: Any = slice(first, last + 1) if self.rows == list(range(first, last + 1)) else self.rows

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, step: Any) -> Any:
        return self.tensors[step][self.index]


@dataclass(frozen=True)
class Record:
    """The uncached runs of P prompts over N steps.

    Attributes:
        latents: after the step before, x_0 .. x_N, (P, ...) each, on the host in the run's own dtype.
        outputs: of the model after guidance, o_0 .. o_{N-1}, likewise.
        gains: c_0 .. c_{N-1} of the solver's steps x' = F + c o.
        timesteps, sigmas: the grid from the run's first step on, N and N + 1 values (no sigmas: empty).
        takes_timesteps: whether the grid can be changed in its timesteps.
        pixels: decoded results in [0, 1], (P, ...).
        memory_limit: bytes of trajectories that may stay in memory; None for no limit.
        uniform: whether each c is the same for all elements; else the outputs are those times c, less its size.
        branches: how many samples the transformer saw for each sample of the latents, at each step; 0 if unknown.
        streams: of further schedulers that the run steps, without pixels.
    """

    latents: Sequence[Tensor]
    outputs: Sequence[Tensor]
    gains: list[float]
    timesteps: list[float]
    sigmas: list[float]
    takes_timesteps: bool
    pixels: Tensor
    memory_limit: int | None = None
    uniform: bool = True
    branches: tuple[float, ...] = ()
    streams: tuple["Record", ...] = ()

    def __len__(self) -> int:
        return len(self.latents[0])

    @property
    def num_steps(self) -> int:
        return len(self.outputs)

    @property
    def copies(self) -> int:
        """Rows of latents for each prompt, one after the other: DiT steps a second copy of them for guidance."""
        return max(1, len(self) // len(self.pixels)) if len(self.pixels) else 1

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """Rows of the latents that belong to some prompts."""
        return [prompt * self.copies + copy for prompt in prompts for copy in range(self.copies)]

    def subset(self, prompts: Sequence[int]) -> "Record":
        """The record of some prompts, with tensors of their own."""
        rows = self.rows_of(prompts)
        return replace(
            self,
            latents=Rows(self.latents, rows),
            outputs=Rows(self.outputs, rows),
            pixels=self.pixels[list(prompts)],
            streams=tuple(stream.subset(prompts) for stream in self.streams),
        )

    def squared_errors(self, final: Tensor) -> Tensor:
        """Mean squared error of final latents (P, ...) to the recorded ones, (P,)."""
        return (final - self.latents[-1].float()).square().flatten(1).mean(1)


class Recording(Cache):
    """Compute every step and keep what passes by.

    Args:
        memory_limit: bytes of latents and outputs, 2 N + 1 tensors, that may stay in memory; above it all of them go
            to files in the system's temporary folder. None for no limit.
        on_begin: told the number of steps, before anything is computed.
    """

    def __init__(self, memory_limit: int | None = None, on_begin: Callable[[int], None] = lambda _: None) -> None:
        super().__init__((), Coefficients.of_outputs([]))
        self.memory_limit, self.on_begin = memory_limit, on_begin

    def begin(self, scheduler: Any) -> Cache:
        """Forget what was recorded, and begin anew."""
        self._forget(*host_grid(scheduler))
        self.takes_timesteps = takes_timesteps(scheduler)
        self.on_begin(len(self.timesteps))
        return self

    def _forget(self, timesteps: list[float], sigmas: list[float]) -> None:
        self.store = TrajectoryStore(self.memory_limit)
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.gains: list[float] = []
        self.branches: dict[int, float] = {}
        self.timesteps, self.sigmas, self.uniform, self.first = timesteps, sigmas, True, 0
        self.takes_timesteps, self.streams = False, []

    def computes(self, step: int) -> bool:
        return True

    def stream(self, index: int) -> Cache:
        if index > len(self.streams):
            made = type(self)(self.memory_limit)
            made._forget(self.timesteps, self.sigmas)
            self.streams.append(made)
        return super().stream(index)

    def started(self, latents: Tensor, first: int, stream: int) -> None:
        """Know where in the grid the run starts."""
        one = self.stream(stream)
        assert isinstance(one, Recording)
        again, one.first = one.first == first, first
        if not again and not stream:
            self.on_begin(len(self.timesteps) - first)

    def guided(self, step: int, branches: float) -> None:
        """Keep how many samples the transformer saw for each sample of the latents."""
        self.branches[step] = branches

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        if step == 0:
            steps = len(self.timesteps) - self.first
            self.store.plan((steps + 1) * call.sample.nbytes + steps * call.model_output.nbytes)
            self.latents.append(self.store.keep(call.sample))
        offset, gain = affine_step(scheduler, call)
        if not is_affine(scheduler, call, offset, gain):
            raise CalibrationError(not_affine(scheduler or call.parts[0].scheduler, step))  # type: ignore[attr-defined]
        output = call.model_output
        if isinstance(gain, Tensor):
            size = float(gain.square().mean().sqrt().copysign(gain.sum()))
            output, gain, self.uniform = (output.float() * gain / size).to(output.dtype), size, False
        self.outputs.append(self.store.keep(output))
        self.gains.append(gain)
        return call.model_output

    def stepped(self, step: int, latents: Tensor, stream: int = 0) -> None:
        """Keep the latents after a step."""
        one = self.stream(stream)
        assert isinstance(one, Recording)
        one.latents.append(one.store.keep(latents))

    def record(self, pixels: Tensor) -> Record:
        """What was recorded."""
        steps, end = len(self.outputs), self.first + len(self.outputs)
        sigmas = self.sigmas[self.first : end + 1]
        return Record(
            self.latents,
            self.outputs,
            self.gains,
            self.timesteps[self.first : end],
            sigmas if len(sigmas) == steps + 1 else [],
            self.takes_timesteps and not self.first and end == len(self.timesteps),
            pixels,
            self.memory_limit,
            self.uniform,
            tuple(self.branches.get(step, 0.0) for step in range(steps)),
            tuple(one.record(pixels) for one in self.streams if isinstance(one, Recording)),
        )


def not_affine(scheduler: Any, step: int) -> str:
    """Say that a scheduler's step cannot be fitted, and what to do."""
    config = dict(getattr(scheduler, "config", {}))
    on = [name for name in ("clip_sample", "thresholding") if config.get(name)]
    cause = f"; its {' and '.join(on)} cuts off values" if on else ""
    remedy = f"set {', '.join(f'{name}=False' for name in on)} in its config" if on else "use another scheduler"
    return (
        f"step {step} of {type(scheduler).__name__} is no linear function of the model output{cause}: ERTACache cannot "
        f"fit it, so {remedy}"
    )


def gram_matrix(outputs: Sequence[Tensor]) -> Array:
    """G[i, j] = <o_i, o_j> / numel, pooled over prompts, (N, N).

    In pieces of GRAM_VALUES values, so that its memory does not grow with the trajectories.
    """
    num_steps = len(outputs)
    flat = [output.flatten() for output in outputs]
    size = flat[0].numel()
    gram = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    width = max(1, GRAM_VALUES // num_steps)
    for start in range(0, size, width):
        piece = torch.stack([values[start : start + width].double() for values in flat])  # (N, width)
        gram += piece @ piece.T
    return ((gram + gram.T) / (2 * size)).numpy()
