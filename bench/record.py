"""What every bench shares: where results go, what they say about the machine, and the command line's short errors."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ertacache import provenance
from ertacache.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
STARTED = time.perf_counter()


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device, threads, dtype, versions and commit: what a time depends on beside the settings."""
    return {
        "commit": commit(),
        "device": device_name(device),
        "device_kind": device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {**provenance.package_versions(), "python": platform.python_version()},
    }


def commit(folder: Path = ROOT) -> str:
    """The short name of the commit that runs, with a "+" where its Python files were changed; "unknown" without git."""
    try:
        name, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "*.py"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changed else name


def attempted(work: Callable[[], Any]) -> Any:
    """What `work` returns, or `failure`: a check that fails is a result too, and must not lose the others."""
    try:
        return work()
    except Exception as problem:
        return failure(problem)


def failure(problem: Exception) -> dict[str, str]:
    """{"error": class and first line of the message}; all of it is printed."""
    print(f"failed: {type(problem).__name__}: {problem}", file=sys.stderr)
    first = (str(problem).strip().splitlines() or [""])[0]
    return {"error": f"{type(problem).__name__}: {first}"[:200]}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of its cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()} ({cores} core{'s' * (cores != 1)})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "CPU"


def write(name: str, record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `record` as <folder>/<name>.json, with the seconds since the command began, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**record, "seconds": round(time.perf_counter() - STARTED, 1)}
    path = write_atomically(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    print(path, file=sys.stderr)
    return path


def read(pattern: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results whose names match."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{pattern}.json"))]
