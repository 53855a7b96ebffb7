"""Write files atomically: a reader never sees half of one."""

import contextlib
import os
import secrets
import time
from pathlib import Path

MAX_NAME = 120  # characters of the name that the temporary one repeats, so that it stays a legal name
STALE_SECONDS = 3600.0


def write_atomically(path: str | Path, data: str | bytes) -> Path:
    """Write under a temporary name in the same folder, then rename: whole, or not at all.

    A full disk or a read-only folder raises OSError and leaves the old file. A killed process leaves a hidden
    temporary file at most; the next write of the same name removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{path.name[:MAX_NAME]}."
    temporary = path.with_name(f"{stem}{os.getpid()}-{secrets.token_hex(4)}.tmp")  # threads write here, too
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # a disk that delays writing says only here that it is full
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _clear_stale(path.parent, stem)
    return path


def _clear_stale(folder: Path, stem: str) -> None:
    """Remove temporary files of killed processes, never one that may still be written."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(stem) and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)
