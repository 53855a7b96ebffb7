"""Follow a run by its transformer's calls alone: which step a call belongs to, and which guidance branch."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ertacache.attach import FiniteCheck
from ertacache.cache import Cache
from ertacache.checks import AGAIN, GRID_TOLERANCE
from ertacache.errors import MismatchError, StateError


@dataclass
class Branch:
    """One guidance branch of a run."""

    condition: list[Tensor]  # held, so that no other tensor can take its place in memory during the run
    caches: list[Cache] = field(default_factory=list)  # of each tensor that the model returns
    container: Any = None  # of the model's output: its type
    shapes: list[torch.Size] = field(default_factory=list)  # of the tensors in it
    last_step: int = -1


class FollowedRun:
    """Which step a call belongs to, and which branch; host state only.

    A branch that comes again is at its next step; one that was never seen belongs to step 0 or starts a new run, which
    its timestep tells. Whatever does not fit the calibrated timesteps raises and forgets the run, so that no run is
    answered from the history of one that was given up. A timestep on a CUDA device is copied out in the background and
    looked at one step later, since looking would halt the device.
    """

    def __init__(self, timesteps: Sequence[float]):
        self.timesteps = list(timesteps)
        self.reset()

    def reset(self) -> None:
        """Forget the run, if there is one; the next call begins a new one."""
        self.step: int | None = None
        self.branches: dict[Hashable, Branch] = {}
        self.finite = FiniteCheck()
        self._copied: tuple[Tensor, Any, float] | None = None  # timestep on its way to the host, event, tolerance

    @property
    def current_step(self) -> int:
        """The step of the call that was placed last, where a run is on."""
        assert self.step is not None
        return self.step

    def place(self, key: Hashable, condition: list[Tensor], timestep: Any) -> Branch:
        """The branch of a call; `step` is then the call's.

        Raises:
            MismatchError: the run's timesteps are not the calibrated ones.
            StateError: the calls do not make up a run that can be followed.
        """
        branch = self.branches.get(key)
        if self.step is None:
            self._begin(timestep)
        elif branch is not None and branch.last_step == self.step:
            self._advance(key, timestep)
        elif branch is None and self.step > 0:
            self._begin_again(timestep)
        else:
            self._stay(timestep)
        branch = self.branches.get(key)
        if branch is None:
            branch = self.branches[key] = Branch(condition)
        step = self.current_step
        if branch.last_step != step - 1:
            self._refuse(f"a guidance branch was left out between step {branch.last_step} and step {step}")
        branch.last_step = step
        return branch

    def is_over(self) -> bool:
        """Whether the last branch of the last step was called."""
        last = len(self.timesteps) - 1
        return self.step == last and all(b.last_step == last for b in self.branches.values() if b.last_step >= last - 1)

    def finish(self, was_computed: Callable[[int], bool]) -> None:
        """Drop everything at the end of a run; raises NumericsError where an output that `finite` saw was bad."""
        finite = self.finite
        self._verify_copied()
        self.reset()
        finite.verify(was_computed)

    def _begin(self, timestep: Any) -> None:
        self._verify_copied()  # an answer that was given wrongly may be part of the run that begins
        self.reset()
        value = read_value(timestep)
        if value is not None and self._fits(1000 * value, 0, timestep):
            raise MismatchError(
                f"the model is given t / 1000 ({value:g} for {1000 * value:g}), as FLUX is; a transformer alone is "
                "followed by timesteps of 0 to 1000: apply the calibration to its pipeline"
            )
        if value is not None and not self._fits(value, 0, timestep):
            raise MismatchError(
                f"the run starts at timestep {value:g}, the calibrated one at {self.timesteps[0]:g}: another noise "
                f"grid, or a run that starts in the middle; {AGAIN}"
            )
        self.step = 0

    def _begin_again(self, timestep: Any) -> None:
        """A branch that was never seen comes late: it is the first of a new run, or nothing that can be followed."""
        value = read_value(timestep)
        if value is not None and not self._fits(value, 0, timestep):
            self._refuse(
                f"a call at step {self.step} (timestep {value:g}) is conditioned by tensors that no earlier call had: "
                "ERTACache tells guidance branches apart by them, so they must be the same ones in all steps of a run"
            )
        self._begin(timestep)

    def _advance(self, key: Hashable, timestep: Any) -> None:
        """A branch comes again: at its next step, or in a new run."""
        self._verify_copied()
        value, following = host_value(timestep), self.current_step + 1
        if following == len(self.timesteps):
            self._begin(timestep)  # the last run ended with fewer branches than it began with
        elif value is not None and not self._fits(value, following, timestep) and self._fits(value, 0, timestep):
            if self.step == 0:
                del self.branches[key]  # the other branches may be the new run's already
            else:
                self._begin(timestep)  # the last run was given up
        else:
            self.step = following
            self._check(value, timestep)
            self._copied = None if value is not None else copied_to_host(timestep)

    def _stay(self, timestep: Any) -> None:
        """Another branch of the present step.

        At the first step and the last one its timestep is looked at on any device: at the first one it may come from
        a later step of a run that began unnoticed, and after the last one there is no call at which it would show.
        """
        at_ends = self.step in (0, len(self.timesteps) - 1)
        value = read_value(timestep) if at_ends else host_value(timestep)
        if value is not None and not self._fits(value, self.current_step, timestep) and self._fits(value, 0, timestep):
            self._begin(timestep)  # the last run was given up between its branches
            return
        self._check(value, timestep)

    def _check(self, value: float | None, timestep: Any) -> None:
        step = self.current_step
        if value is not None and not self._fits(value, step, timestep):
            expected = self.timesteps[step]
            self._refuse(
                f"timestep {value:g} came where the calibrated grid has {expected:g} (step {step}): another "
                f"number of steps or noise grid ({AGAIN}), or a branch that is called twice a step",
                MismatchError,
            )

    def _verify_copied(self) -> None:
        if self._copied is None:
            return
        (host, event, tolerance), self._copied = self._copied, None
        event.synchronize()
        value, expected = float(host[0]), self.timesteps[self.current_step]
        if abs(value - expected) > tolerance:
            self._refuse(
                f"timestep {value:g} came where the calibrated grid has {expected:g} (step {self.step}): another noise "
                "grid, or a run that began after another one was given up. The latter works when it is started anew"
            )

    def _fits(self, value: float, step: int, timestep: Any) -> bool:
        return abs(value - self.timesteps[step]) <= tolerance_of(value, timestep)

    def _refuse(self, message: str, kind: type[Exception] = StateError) -> None:
        self.reset()
        raise kind(message)


# -- timesteps -------------------------------------------------------------------------------------------


def host_value(timestep: Any) -> float | None:
    """The timestep where it costs nothing to look, the first one of a batch; None for one on a CUDA device."""
    if isinstance(timestep, Tensor) and (timestep.is_cuda or timestep.is_meta):
        return None
    return read_value(timestep)


def read_value(timestep: Any) -> float | None:
    """The timestep, waiting for its device if need be; None where there is no number (meta tensors)."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    return None if timestep.is_meta else float(timestep.reshape(-1)[0])


def tolerance_of(value: float, timestep: Any) -> float:
    """How far a timestep may be off: rounding of the grid, and of the dtype that the loop casts it to."""
    floating = isinstance(timestep, Tensor) and timestep.is_floating_point()
    return GRID_TOLERANCE + (abs(value) * torch.finfo(timestep.dtype).eps / 2 if floating else 0.0)


def copied_to_host(timestep: Tensor) -> tuple[Tensor, Any, float] | None:
    """(pinned host tensor, event after which it holds the timestep, tolerance); None for meta tensors."""
    if not timestep.is_cuda:
        return None
    first = timestep.detach().reshape(-1)[:1]
    host = torch.empty(1, dtype=first.dtype, pin_memory=True).copy_(first, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(timestep.device))
    return host, event, tolerance_of(1000.0, timestep)
