"""Keep finished pieces of long work on disk, so an interrupted command goes on where it was."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare import processes
from ertacache.files import write_atomically


class Ledger:
    """JSON results by name, valid for one `subject`: everything that they depend on.

    Another subject starts an empty ledger; the old results stay on disk beside it.
    """

    def __init__(self, folder: Path, subject: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(subject, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.folder = folder / digest

    def get(self, name: str, make: Callable[[], Any], alone: bool = False) -> Any:
        """Return the kept result `name`, or make it with `make` and keep it.

        Several processes call this together; only the main one reads and writes, and all get its value.

        Args:
            alone: only the main process makes it while the others wait, as when time is measured.
        """
        path, main = self.path(name, ".json"), processes.is_main()
        kept = processes.agreed(_read(path) if main else [])
        if kept:
            return kept[0]
        result = make() if main or not alone else None
        if main:
            write_atomically(path, json.dumps(result))
        return processes.agreed(result)

    def path(self, name: str, suffix: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:16] + suffix)


def _read(path: Path) -> list[Any]:
    """The result in a file as a list of one; an empty list if it is missing or damaged."""
    if path.exists():
        try:
            return [json.loads(path.read_text(encoding="utf-8"))]
        except ValueError:  # damaged after it was written: a broken disk, or an editor
            print(f"{path} is damaged: made again", file=sys.stderr)
    return []
