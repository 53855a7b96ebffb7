"""Fuzzes the loader of calibration files: `python bench/fuzz_calibration.py [--seconds 300]`.

Mutates the checked-in calibrations as bytes (bit flips, cuts, splices, repeated pieces) and as JSON (wrong types,
huge numbers, deep nesting, unknown fields). What loads must be whole: it prints, saves and loads again as the same.
What does not load must give the one documented error in bounded time and memory. An input that reached a new message
of the loader is kept and mutated further, which leads the search to code that was not reached before.
Writes bench/results/fuzz_calibration.json.
"""

import argparse
import copy
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, machine, write
from tqdm import tqdm

from ertacache.calibration import Calibration, to_json
from ertacache.errors import CalibrationError

VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, 1e308, "", "x" * 10_000, "\ud800", [], {}, [[]]]
TOKENS = [b"1e999", b"NaN", b"-Infinity", b"[" * 5000, b"9" * 5000, b'"\\ud800"', b"null", b'{"a":', b"\x00", b"\xff"]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(changed)) if changed else 0
        kind = rng.randrange(5)
        if kind == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = rng.choice(TOKENS)
        elif kind == 3:
            end = min(len(changed), place + rng.randrange(1, 60))
            changed[place:place] = changed[place:end] * rng.choice([1, 2, 50])
        else:
            del changed[place : place + rng.randrange(1, 60)]
    return bytes(changed)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutated_bytes(data, rng)
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = _with_one_change(value, rng)
    return json.dumps(value).encode()


def _with_one_change(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(VALUES))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    change = rng.randrange(6)
    if change == 0:
        del value[key]
    elif change == 1 and isinstance(value, dict):
        value[rng.choice(["extra", "schema", "", "__class__", "method"])] = copy.deepcopy(rng.choice(VALUES))
    elif change == 2 and isinstance(value, list):
        value.insert(key, copy.deepcopy(rng.choice(VALUES)))
    else:
        value[key] = _with_one_change(value[key], rng)
    return value


def outcome(path: Path) -> str:
    """ "loads", or the message of the documented error without its particulars; anything else raises."""
    try:
        loaded = Calibration.load(path)
    except CalibrationError as error:
        text = str(error).removeprefix(str(path))
        assert "\n" not in text and len(text) < 1000, "not one short line"
        return re.sub(r"[\d.]+|'[^']*'|\(.*\)", "~", text)[:100]
    assert all(line.isprintable() for line in loaded.summary().split("\n")), "control characters"
    assert Calibration.from_dict(json.loads(to_json(loaded.to_dict()))) == loaded, "does not come back"
    return "loads"


def fuzz(seconds: float, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    corpus = [path.read_bytes() for path in sorted(ROOT.glob("ERTACache4*/calibration/*.json"))]
    counts: Counter[str] = Counter()
    slowest = 0.0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=round(seconds), unit="s", mininterval=1) as bar:
        path = Path(folder) / "fuzzed.json"
        while (passed := time.monotonic() - start) < seconds:
            data = (mutated_json if rng.random() < 0.5 else mutated_bytes)(rng.choice(corpus), rng)
            path.write_bytes(data)
            before = time.monotonic()
            found = outcome(path)
            slowest = max(slowest, time.monotonic() - before)
            if found not in counts and len(data) < 200_000:
                corpus.append(data)
            counts[found] += 1
            bar.update(round(passed) - bar.n)
    return {
        "inputs": sum(counts.values()),
        "loaded_whole": counts["loads"],
        "refused": sum(counts.values()) - counts["loads"],
        "undocumented_errors": 0,  # one would have ended this run
        "different_messages": len(counts) - 1,
        "kept_for_further_mutation": len(corpus),
        "slowest_seconds": round(slowest, 4),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "messages": dict(counts.most_common()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the loader of calibration files.")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    result = {"fuzzed_seconds": chosen.seconds, "seed": chosen.seed, **fuzz(chosen.seconds, chosen.seed)}
    write("fuzz_calibration", {**machine(torch.device("cpu"), torch.float32), **result}, chosen.out)
    print({k: v for k, v in result.items() if k != "messages"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
