"""Real size on a GPU in one command, `sh bench/gpu.sh`: over in nine minutes, whatever happens.

    sh bench/gpu.sh             everything, on a CUDA device
    sh bench/gpu.sh flux wan    these parts
    sh bench/gpu.sh --dry       the same cut down, on a CPU
    sh bench/gpu.sh --needs     packages to carry to a machine that has Python and a CUDA build of PyTorch

Each part (gpu_parts.py) is a process with a time limit of its own: one that hangs, fails, lacks a package or runs out
of memory costs no other. The next one loads its packages meanwhile. Parts come in order of worth, and those for which
no time is left are skipped. Writes <out>/<part>.json after every measurement and <out>/run.json after every part.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# seconds at most, in order of worth
PARTS = {"flux": 125, "wan": 100, "rivals": 110, "compiled": 170, "cogvideox": 60, "opensora": 60, "offload": 60}
LEAST = 20.0  # seconds without which a part is not begun
LAST = 15.0  # seconds that are kept for ending
PATIENCE = 5.0  # seconds for a killed process to be gone
NEEDED = ("diffusers", "transformers", "accelerate", "safetensors", "tqdm", "numpy", "pillow", "ftfy")
CARRIED_IF_WANTED = ("cache-dit",)
TAIL = 1500  # characters of what a part that failed said last
NO_PART_CAN_RUN = "impossible"


class Worker:
    """One part's process: it loads what it needs, waits until it is told how long it has, and works.

    Args:
        module: name of the one whose `run` does the work.
    """

    def __init__(self, name: str, module: str, folder: Path, dry: bool, logs: Path):
        # nothing is loaded twice on a CPU; a device does not survive a fork
        context: Any = multiprocessing.get_context("fork" if dry else "spawn")
        self.name, self.log = name, logs / f"{name}.log"
        self.connection, inner = context.Pipe()
        given = (name, module, str(folder), dry, str(self.log), inner)
        self.process = context.Process(target=work, args=given, name=name)
        self.process.start()
        inner.close()

    def run(self, seconds: float) -> dict[str, Any]:
        """Let it work for so many seconds, pass on what it says, and return how it ended."""
        began, end = time.monotonic(), time.monotonic() + seconds
        with suppress(OSError):  # it ended while it waited
            self.connection.send(end)
        status, message = "failed", ""
        try:
            while self.connection.poll(max(0.0, end - time.monotonic())):
                kind, text = self.connection.recv()
                if kind == "line":
                    print(f"{self.name}: {text}", flush=True)
                else:
                    status, message = kind, text
            status, message = "out of time", f"ended after {seconds:.0f} s"
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            if status == "failed" and not message:
                message = f"exit code {self.process.exitcode}"
        self.kill()
        ended = {"part": self.name, "status": status, "seconds": round(time.monotonic() - began, 1), "message": message}
        if status != "done":
            ended["tail"] = self._tail()
        return ended

    def kill(self) -> None:
        """End it and what it has started."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # where it has no group of its own yet
        self.process.join(PATIENCE)
        self.connection.close()

    def _tail(self) -> str:
        with suppress(OSError):
            return self.log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        return ""


def work(name: str, module: str, folder: str, dry: bool, log: str, connection: Connection) -> None:
    """A worker's process."""
    os.setsid()
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status, message = "failed", ""
    try:
        parts = importlib.import_module(module)
        until = connection.recv()
        parts.run(name, Path(folder), until, dry, lambda line: connection.send(("line", line)))
        status = "done"
    except ImportError as problem:
        status, message = "lacks a package", str(problem)
    except SystemExit as reason:
        status, message = NO_PART_CAN_RUN, str(reason)
    except BaseException as problem:
        import traceback

        traceback.print_exc()
        message = f"{type(problem).__name__}: {problem}"[:300]
    with suppress(OSError):
        connection.send((status, message))
    sys.stderr.flush()
    os._exit(0)  # no part's end waits for the device


def run_all(
    names: Sequence[str],
    folder: Path,
    seconds: float,
    dry: bool,
    limits: dict[str, float],
    module: str = "gpu_parts",
    least: float = LEAST,
) -> list[dict[str, Any]]:
    """Run the parts one after another, `seconds` in all, and return how each one ended."""
    began = time.monotonic()
    end, ended = began + seconds, []
    with tempfile.TemporaryDirectory() as logs, ExitStack() as started:

        def start(index: int) -> Worker | None:
            if index == len(names):
                return None
            worker = Worker(names[index], module, folder, dry, Path(logs))
            started.callback(worker.kill)
            return worker

        following = start(0)
        for index, name in enumerate(names):
            worker, following = following, start(index + 1)
            left = end - time.monotonic()
            if ended and ended[-1]["status"] == NO_PART_CAN_RUN:
                ended.append({**ended[-1], "part": name, "tail": ""})
            elif left < least:
                ended.append({"part": name, "status": "skipped", "message": "no time was left"})
            else:
                ended.append(worker.run(min(limits[name], left)))
            print(line_of(ended[-1]), flush=True)
            if ended[-1]["status"] != NO_PART_CAN_RUN:  # of such a run nothing is to be kept
                took, date = round(time.monotonic() - began, 1), datetime.now(UTC).strftime("%Y-%m-%d")
                write(folder / "run.json", {"date": date, "dry": dry, "seconds": took, "parts": ended})
    return ended


def line_of(ended: dict[str, Any]) -> str:
    """How a part ended, in a line, with the last that it said where it failed."""
    took = f" after {ended['seconds']:.0f} s" if "seconds" in ended else ""
    lines = [f"{ended['part']}: {ended['status']}{took}" + (f": {ended['message']}" if ended["message"] else "")]
    return "\n".join(lines + [f"    {line}" for line in ended.get("tail", "").splitlines()[-8:]])


def write(path: Path, record: dict[str, Any]) -> None:
    """Atomically, without a package of ours or of anyone: those may be what is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# -- what must be there ------------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    """Versions of requirements.lock by name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def requirements(name: str) -> Iterator[str]:
    """Names of what an installed package needs here."""
    from packaging.requirements import Requirement

    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield normal(requirement.name)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: Sequence[str]) -> set[str]:
    """The packages and what they need, as far as they are installed here."""
    found, waiting = set(), [normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            with suppress(ImportError):  # not here, so its needs are not known; nor without `packaging`
                waiting += requirements(name)
    return found


def needs() -> list[str]:
    """A line a package, as requirements files have them, with what is here."""
    versions = locked()
    lines = []
    for name in sorted(closure(NEEDED) - closure(["torch"])):
        pinned = f"{name}=={versions[name]}" if name in versions else name
        lines.append(f"{pinned}  # here: {version_here(name)}")
    return lines + [f"# {name}, if it is to be compared  # here: {version_here(name)}" for name in CARRIED_IF_WANTED]


def version_here(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 if every part is done, 1 if some are not, 2 if none can run."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--dry", action="store_true", help="on a CPU, cut down; writes to build/gpu")
    parser.add_argument("--needs", action="store_true", help="print what to carry, and run nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="when all is over")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/gpu)")
    options = parser.parse_args(argv)
    if options.needs:
        print("\n".join(needs()))
        return 0
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    folder = options.out or ROOT / ("build/gpu" if options.dry else "bench/results/gpu")
    here = ", ".join(f"{name} {version_here(name)}" for name in ("torch", *NEEDED[:3], *CARRIED_IF_WANTED))
    print(f"{here}; results in {folder}", flush=True)
    if options.dry:
        with suppress(ImportError):  # each part says it again
            importlib.import_module("gpu_parts")
    seconds = 60 * options.minutes - LAST - (time.monotonic() - began)
    ended = run_all(options.parts, folder, seconds, options.dry, PARTS)
    print("\n".join(["", *(line_of({**one, "tail": ""}) for one in ended)]))
    statuses = {one["status"] for one in ended}
    return 0 if statuses == {"done"} else 2 if NO_PART_CAN_RUN in statuses else 1


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt  # so that the parts' processes, which get no signal of their own, end too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)  # a process that cannot be killed is not waited for
