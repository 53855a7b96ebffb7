"""Time of the denoising loop and peak memory of a run."""

import resource
import sys
import time
from typing import Any

import torch


class DenoiseTimer:
    """Times the denoising loop of a diffusers pipeline: what its progress bar encloses, without decoding.

    Synchronises the device at both ends of the loop only. `seconds` holds one number for each run.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.seconds: list[float] = []

    def __enter__(self) -> "DenoiseTimer":
        original = self.pipe.progress_bar
        self.pipe.progress_bar = lambda *args, **kwargs: _TimedBar(original(*args, **kwargs), self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.__dict__.pop("progress_bar", None)


class _TimedBar:
    def __init__(self, bar: Any, seconds: list[float]):
        self.bar, self.seconds = bar, seconds

    def __enter__(self) -> Any:
        _synchronize()
        self.start = time.perf_counter()
        return self.bar.__enter__()

    def __exit__(self, *details: Any) -> Any:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        return self.bar.__exit__(*details)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory so far: allocated on the CUDA device, or resident in the host process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
