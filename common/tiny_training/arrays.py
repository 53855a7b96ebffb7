"""Arrays on disk that are filled piece by piece and resume after an interruption."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

MARK_EVERY_SECONDS = 5


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process makes the file `path`; the lock is a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def filled_array(
    path: Path, shape: tuple[int, ...], dtype: str, fill: Callable[[int, int], np.ndarray], piece: int
) -> np.ndarray:
    """The array at `path`, mapped from disk; rows that are not there yet come from `fill(start, stop)`.

    Args:
        path: an .npy file. While it is incomplete it carries the suffix `.part`, with a file `.done` beside it
            that holds the number of finished rows.
        shape: (rows, ...) of the whole array.
        fill: returns rows start to stop, (stop - start, ...).
        piece: rows asked for at a time.

    Raises:
        ValueError: the file holds another shape or dtype.
    """
    if not path.exists():
        _fill(path, shape, dtype, fill, piece)
    # copy on write: torch wants writable memory, the file stays as it is
    array = np.load(path, mmap_mode="c")
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, not {dtype} {shape}: delete it")
    return array


def _fill(path: Path, shape: tuple[int, ...], dtype: str, fill: Callable, piece: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part, done = path.with_suffix(".part"), path.with_suffix(".done")
    start = int(done.read_text()) if part.exists() and done.exists() else 0
    array = np.lib.format.open_memmap(part, "r+" if start else "w+", dtype=dtype, shape=shape)
    bar = tqdm(total=shape[0], initial=start, desc=path.stem, mininterval=MARK_EVERY_SECONDS)
    for first in range(start, shape[0], piece):
        last = min(first + piece, shape[0])
        array[first:last] = fill(first, last)
        array.flush()
        done.write_text(str(last))
        bar.update(last - first)
    bar.close()
    os.replace(part, path)
    done.unlink(missing_ok=True)
