"""What caches hold: bytes of live tensors at the end of each step, and the most within steps, beyond the uncached run.

Counts storages, each once, so it sees what a process keeps on any device and not what an allocator has reserved.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from record import failure
from step_timer import Call
from torch.profiler import ProfilerActivity, profile

import ertacache
from compare.rivals import (
    FasterCache,
    FirstBlockCache,
    MagCache,
    NotApplicable,
    PyramidAttentionBroadcast,
    SeaCache,
    TaylorSeer,
)
from ertacache.calibration import Calibration

Attach = Callable[[], AbstractContextManager[Any]]

ALWAYS = 1e9  # threshold; memory is that of a run that reuses whenever it may


def live_bytes(device: torch.device) -> int:
    """Bytes of all storages that a Python object refers to; those of `gc.freeze` are left out."""
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == device.type:
            storage = thing.untyped_storage()
            with suppress(RuntimeError):  # tensors of torch.compile's that have shapes only
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def held_bytes(call: Call, device: torch.device) -> int:
    """Most bytes of the run's own tensors at the end of a step."""
    seen: list[int] = []

    def look(*_: Any) -> dict[str, Any]:
        seen.append(live_bytes(device))
        return {}

    gc.collect()
    gc.freeze()  # weights and embeddings are no part of it, and looking through them takes long
    try:
        with torch.no_grad():
            call(callback_on_step_end=look)
    finally:
        gc.unfreeze()
    return max(seen)


def peak_bytes(call: Call) -> int:
    """Most bytes that are allocated at once in a run on a CPU, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.no_grad():
        call()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


def compare_memory(
    pipe: Any, call: Call, calibration: Calibration, output_bytes: int, device: torch.device
) -> list[dict[str, Any]]:
    """One entry a cache: bytes beyond the uncached run, also in units of one guided output."""
    call()  # whatever the first run leaves behind is not the cache's
    plain, plain_peak = held_bytes(call, device), peak_bytes(call)
    found = [{"method": "none", "held_bytes": plain, "peak_bytes": plain_peak}]
    for name, attach in _caches(pipe, calibration):
        try:
            with attach():
                held = held_bytes(call, device)
            with attach():  # anew, so that what the first run keeps for the next ones counts
                peak = peak_bytes(call)
        except NotApplicable as reason:
            found.append({"method": name, "not_applicable": str(reason)})
            continue
        except Exception as problem:
            found.append({"method": name, **failure(problem)})
            continue
        found.append(
            {
                "method": name,
                "held_bytes": held,
                "peak_bytes": peak,
                "beyond_uncached_bytes": held - plain,
                "beyond_uncached_outputs": (held - plain) / output_bytes,
                "peak_beyond_uncached_bytes": peak - plain_peak,
            }
        )
    return found


def _caches(pipe: Any, calibration: Calibration) -> list[tuple[str, Attach]]:
    steps = calibration.num_inference_steps
    series = {"cache_interval": 2, "max_order": 2, "disable_cache_before_step": 3}
    settings = [
        (TaylorSeer(lite=True), series),
        (TaylorSeer(lite=False), series),
        (FirstBlockCache(), {"threshold": ALWAYS}),
        (MagCache([1.0] * steps), {"threshold": ALWAYS, "max_skip_steps": 1, "retention_ratio": 0.1}),
        (SeaCache(), {"threshold": ALWAYS, "residual_order": 1, "max_consecutive_cached": 1}),
        (PyramidAttentionBroadcast(), {"skip_range": 2, "lowest_timestep": -1, "highest_timestep": 1001}),
        (FasterCache(), {"skip_range": 2, "highest_timestep": 901}),
    ]
    rivals = [(rival.name, partial(rival.attach, pipe, setting)) for rival, setting in settings]
    return [("ertacache", partial(ertacache.apply, pipe, calibration)), *rivals]
