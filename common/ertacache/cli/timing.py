"""Time the denoising loop and read peak memory."""

import resource
import sys
import time
from typing import Any

import torch


class DenoiseTimer:
    """Time the denoising loop of a diffusers pipeline: what its progress bar encloses, without decoding.

    Synchronises the device only at both ends of the loop. `seconds` holds one number per run.
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
    """Peak memory so far, in bytes: allocated on the CUDA device or, without one, resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
