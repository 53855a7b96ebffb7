"""Share a comparison out over several processes; only the main one keeps results.

    accelerate launch --num_processes 4 reproduce.py       four GPUs, or four processes on a CPU

Without a launcher there is one process, and all of this does nothing.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, gather_object  # type: ignore[import-untyped]

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)  # others wait while the main process measures times, or for the slowest share


def start() -> None:
    """Join the processes of a launcher, each on a device of its own; call it before loading a model."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def stop() -> None:
    """Leave the process group, when all work is done."""
    if count() > 1:
        PartialState().destroy_process_group()


def count() -> int:
    """Number of processes."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def is_main() -> bool:
    return count() == 1 or PartialState().is_main_process


def shared_out(items: Sequence[Item]) -> list[Item]:
    """This process's share: neighbouring items, the first processes taking the first ones."""
    if count() == 1:
        return list(items)
    with PartialState().split_between_processes(list(items)) as mine:
        return list(mine)


def gathered(mine: list[Item]) -> list[Item]:
    """Put the shares of all processes together, in every process."""
    return mine if count() == 1 else gather_object(mine)


def agreed(value: Any) -> Any:
    """The main process's value, in every process."""
    return value if count() == 1 else broadcast_object_list([value])[0]
