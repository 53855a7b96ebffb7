"""Keep calibrations for the next process: one folder, a JSON file for each setting and goal."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError, EnableWarning

try:
    import fcntl
except ImportError:  # no such locks here: two processes may fit the same, and the last one's file stays
    fcntl = None  # type: ignore[assignment]

HOME = "ERTACACHE_HOME"


def default_folder() -> Path:
    """`ERTACACHE_HOME`, or the platform's cache folder."""
    named = os.environ.get(HOME)
    if named:
        return Path(named).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "ertacache"


class Store:
    """Calibrations in a folder, which is made when the first is saved. Several processes may use it at once."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else default_folder()
        self._read: dict[str, tuple[int, Calibration | None]] = {}  # when each file was written, and what it held

    def load(self, name: str) -> Calibration | None:
        """The calibration of that name; None where there is none, or a damaged one, which is said once."""
        path = self.folder / name
        try:
            written = path.stat().st_mtime_ns
            known = self._read.get(name)
            if known is None or known[0] != written:
                known = self._read[name] = (written, _loaded(path))
            return known[1]
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(f"a stored calibration is left out ({error})", EnableWarning, stacklevel=3)
            return None

    def find(self, name: str, fits: Callable[[Calibration], bool]) -> Calibration | None:
        """The calibration of that name, or any other that fits; what a file holds decides."""
        for one in (name, *(other for other in self.names() if other != name)):
            found = self.load(one)
            if found is not None and fits(found):
                return found
        return None

    def save(self, name: str, calibration: Calibration) -> Path:
        """Write a calibration, whole or not at all. Raises OSError: it cannot be written."""
        return calibration.save(self.folder / name)

    def names(self) -> list[str]:
        """Of all files that may be calibrations."""
        return sorted(path.name for path in self.folder.glob("*.json") if not path.name.startswith("."))

    def remove(self, name: str) -> None:
        """Delete a calibration. Raises OSError: it cannot be deleted."""
        (self.folder / name).unlink()
        (self.folder / f".{name}.lock").unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold the lock of a name in a block; False where another process holds it.

        The system frees the lock of a process that ends, however it ends: a file that is left over locks nothing.
        """
        path = self.folder / f".{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
        except OSError:  # nothing can be stored, so there is nothing to guard
            yield True
            return
        with file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks
                yield True
                return
            if not _is_at(file, path):  # its last owner has just removed it
                yield False
                return
            try:
                _sign(file)
                yield True
            finally:
                path.unlink(missing_ok=True)


def _loaded(path: Path) -> Calibration | None:
    try:
        return Calibration.load(path)
    except CalibrationError as error:
        warnings.warn(f"a stored calibration is left out ({error})", EnableWarning, stacklevel=4)
        return None


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _sign(file: TextIO) -> None:
    """Say in a lock whose it is, for people."""
    with suppress(OSError):  # a full disk; the lock holds without
        file.truncate(0)
        file.write(f"{os.getpid()} {time.strftime('%Y-%m-%dT%H:%M:%S')}\n")
        file.flush()
