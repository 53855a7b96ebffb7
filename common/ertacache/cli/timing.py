"""Time the denoising loop and read peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

        @contextmanager
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            _synchronize()
            start = time.perf_counter()
            with original(*args, **kwargs) as bar:
                yield bar
            _synchronize()
            self.seconds.append(time.perf_counter() - start)

        self.pipe.progress_bar = timed
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.__dict__.pop("progress_bar", None)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak memory so far, in bytes: allocated on the CUDA device or, without one, resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
