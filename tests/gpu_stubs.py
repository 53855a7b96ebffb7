"""Stands for gpu_parts in the tests of bench/gpu.py: parts that end in every way, and load nothing."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def run(name: str, folder: Path, until: float, dry: bool, say: Callable[[str], None]) -> None:
    say(f"{name} begins")
    (folder / f"{name}.json").write_text(json.dumps({"left": until - time.monotonic()}))
    if name == "hangs":
        helper = subprocess.Popen(["sleep", "60"])
        (folder / "helper").write_text(str(helper.pid))
        time.sleep(60)
    elif name == "crashes":
        os.abort()
    elif name == "fails":
        print("what it said last")
        raise MemoryError("no memory left")
    elif name == "lacks":
        import not_installed  # noqa: F401
    elif name == "hopeless":
        raise SystemExit("no CUDA device")
