"""Kills calibration and its ledger at random moments: `python bench/fuzz_kill.py [--kills 100]`.

Each round starts a process that calibrates a small pipeline, saves the file and works through a ledger, as
reproduce.sh does; kills it with SIGKILL; and then looks at everything that it left: every file that a reader would
open must be whole. The last round is not killed and must end with the result of a process that was never disturbed.
Writes bench/results/fuzz_kill.json.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, machine, write
from tqdm import tqdm

import ertacache
from compare.ledger import Ledger
from ertacache.calibration import Calibration
from ertacache.files import write_atomically

sys.path.insert(0, str(ROOT / "tests"))

from toys import ToyPipeline, curved


def work(out: Path, rounds: int, ready: Any = None) -> None:
    """Calibrations through a ledger, each saved as a file too, and their results as one file at the end."""
    if ready is not None:
        ready.set()
    ledger = Ledger(out / ".progress", {"subject": "toy"})
    results = {}
    for count, again in itertools.product((3, 4, 5, 6), range(rounds)):
        made = ledger.get(f"calibration {count} {again}", lambda count=count: calibrated(count))
        Calibration.from_dict(made).save(out / f"c{count}.json")
        results[f"{count} {again}"] = made["coefficients"]
    write_atomically(out / "results.json", json.dumps(results))


def calibrated(count: int) -> dict[str, Any]:
    prompts = [f"p{i}" for i in range(4)]
    made = ertacache.calibrate(
        ToyPipeline(curved), prompts, seeds=range(4), computed_steps=count, num_inference_steps=12, progress=False
    )
    return made.to_dict()


def start(out: Path, rounds: int) -> multiprocessing.Process:
    """A process at work; it starts as a copy of this one, which has loaded everything."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(out, rounds, ready))
    process.start()
    ready.wait()
    return process


def looked_at(out: Path) -> tuple[int, int]:
    """How many whole files and how many hidden temporary ones lie there; a half file raises."""
    whole = 0
    for path in out.rglob("*.json"):
        if path.parent == out and path.name != "results.json":
            Calibration.load(path)
        else:
            json.loads(path.read_text())
        whole += 1
    return whole, sum(1 for _ in out.rglob(".*.tmp"))


def kill_often(kills: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    rounds = -(-kills // 3)  # enough work for so many lives
    files = leftovers = 0
    with tempfile.TemporaryDirectory() as folder:
        out, calm = Path(folder) / "killed", Path(folder) / "calm"
        began = time.monotonic()
        process = start(calm, rounds)
        process.join()
        whole_run = time.monotonic() - began
        assert process.exitcode == 0
        for _ in tqdm(range(kills), unit="kill", mininterval=1):
            process = start(out, rounds)
            # short lives, so that the last one is still at work: what is done is not done again
            time.sleep(rng.random() * max(0.02, 1.5 * whole_run / kills))
            process.kill()
            process.join()
            found, temporary = looked_at(out) if out.exists() else (0, 0)
            files, leftovers = files + found, max(leftovers, temporary)
        finished_before = (out / "results.json").exists()
        process = start(out, rounds)
        process.join()
        assert process.exitcode == 0
        same = (out / "results.json").read_text() == (calm / "results.json").read_text()
        assert same, "the resumed result differs"
        return {
            "kills": kills,
            "files_read_back": files,
            "half_files": 0,  # one would have ended this run
            "most_temporary_files_left": leftovers,
            "all_done_before_the_last_kill": finished_before,
            "resumed_result_is_the_undisturbed_one": same,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill calibration and its ledger at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # threads would not live on in a copied process
    result = kill_often(chosen.kills, chosen.seed)
    write("fuzz_kill", {**machine(torch.device("cpu"), torch.float32), **result}, chosen.out)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
