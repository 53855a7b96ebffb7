"""Refuse a model that several processes run together, where the cache is attached in one of them alone.

A rank that skips the model on a reused step leaves the others waiting, or takes what they send for something else:
the video comes out finite and wrong. So each rank says in torch's own store which schedule it is attached with, and
waits for the others to say the same.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from ertacache.errors import StateError

PATIENCE = 30.0  # seconds in which all ranks must have attached
INTERVAL = 0.05  # seconds between looks at the store
SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DistributedDataParallel")
HOOKED = ("_hf_hook", "_diffusers_hook", "_old_forward")  # of offloading, which replaces forward too


def world_size() -> int:
    """How many processes there are; 1 where torch's process group is not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shared_by_ranks(model: nn.Module) -> str | None:
    """What shows that other processes take part in a model's forward; None for nothing."""
    if world_size() < 2:
        return None
    if "forward" in vars(model) and not any(name in vars(model) for name in HOOKED):
        return "a forward that was replaced"
    for name, part in model.named_modules():
        where = f" of {name}" if name else ""
        if any(kind.__name__ in SHARDED for kind in type(part).__mro__):
            return f"{type(part).__name__}{where}"
        signs = list(_signs(vars(part)))
        if signs:
            return f"{signs[0]}{where}"
    sharded = (name for name, p in model.named_parameters() if type(p.data).__name__ == "DTensor")
    return next((f"the sharded {name}" for name in sharded), None)


def _signs(attributes: dict[str, Any]) -> Iterator[str]:
    """Names of a module's attributes that hold a process group or say that the work is shared."""
    for name, value in attributes.items():
        if _is_group(value) or (name.startswith("enable_") and "parallel" in name and value is True):
            yield name
        elif "parallel" in name and value is not None and not isinstance(value, (bool, int, float, str)):
            sizes = [size for key, size in getattr(value, "__dict__", {}).items() if key.endswith(("_size", "_degree"))]
            if any(isinstance(size, int) and size > 1 for size in sizes) or not sizes:
                yield name


def _is_group(value: Any) -> bool:
    group = dist.is_available() and isinstance(value, dist.ProcessGroup) and value.size() > 1
    return group or (type(value).__name__ == "DeviceMesh" and value.size() > 1)


def joined(models: Iterable[nn.Module], schedule: Sequence[int]) -> "Roll | None":
    """The roll of the ranks that share one of the models, called; None where none is shared.

    Raises StateError: see `Roll.call`.
    """
    sign = next(filter(None, map(shared_by_ranks, models)), None)
    return None if sign is None else Roll(schedule).call(sign)


def check_alone(models: Iterable[nn.Module]) -> None:
    """Raise StateError where other processes take part in a model's forward."""
    sign = next(filter(None, map(shared_by_ranks, models)), None)
    if sign is not None:
        raise StateError(
            f"{world_size()} processes share the model ({sign}), and each would watch and fit alone: calibrate, and "
            "apply the calibration in all of them, see docs/official-packages.md"
        )


class Roll:
    """Say to the other ranks that this one is attached, and hear it from them.

    Args:
        schedule: the computed steps.
    """

    def __init__(self, schedule: Sequence[int]):
        self.text = " ".join(map(str, schedule))
        self.store = dist.distributed_c10d._get_default_store()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def call(self, sign: str) -> "Roll":
        """Wait for the others.

        Args:
            sign: what shows that they take part.

        Raises StateError: one of them is not attached after PATIENCE seconds, or with another schedule.
        """
        self.store.set(self._key(self.rank), "attached")
        end = time.monotonic() + PATIENCE
        missing = list(range(self.size))
        while missing := [rank for rank in missing if not self.store.check([self._key(rank)])]:
            if time.monotonic() > end:
                self.leave()
                raise StateError(
                    f"{self.size} processes share the model ({sign}), and rank {missing[0]} has not applied this "
                    "calibration: apply it in all of them at the same time, see docs/official-packages.md"
                )
            time.sleep(INTERVAL)
        return self

    def leave(self) -> None:
        """Say that this rank is attached no longer."""
        if dist.is_initialized():
            self.store.delete_key(self._key(self.rank))

    def _key(self, rank: int) -> str:
        return f"ertacache/{rank}/{self.text}"
