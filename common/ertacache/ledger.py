"""Keeps finished pieces of long work on disk, so that an interrupted command goes on where it was."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ertacache.files import write_atomically


class Ledger:
    """JSON results by name, valid for one `subject` (whatever the results depend on).

    Another subject starts an empty ledger; results of the old one stay on disk beside it.
    """

    def __init__(self, folder: Path, subject: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(subject, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.folder = folder / digest

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The kept result `name`, or what `make` returns, which is then kept."""
        path = self.path(name, ".json")
        if path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # damaged after it was written: a broken disk, or an editor
                print(f"{path} is damaged: made again", file=sys.stderr)
        result = make()
        write_atomically(path, json.dumps(result))
        return result

    def path(self, name: str, suffix: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:16] + suffix)
