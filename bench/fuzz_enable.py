"""Kills enabled pipelines at random moments: `python bench/fuzz_enable.py [--kills 100]`.

Each round starts one or two processes that share a store; they watch, fit and store one setting after the other, and
are killed with SIGKILL. Then everything that they left is looked at: each file of the store must be a whole
calibration, no uncached result may have differed from the plain pipeline's, and no process may have given a warning.
At last an undisturbed process goes through all settings: it must find the calibrations that a store without any kills
has, and use each at its first call.
Writes bench/results/fuzz_enable.json.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, machine, write
from tqdm import tqdm

import ertacache
from ertacache.auto.store import Store
from ertacache.calibration import Calibration

sys.path.insert(0, str(ROOT / "tests"))

from toys import ToyPipeline, curved

SAMPLES = 2


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def work(store: Path, out: Path, settings: list[int], ready: Any = None) -> None:
    """Use an enabled pipeline at one setting after the other; whatever is wrong goes to a file."""
    warnings.simplefilter("error")
    pipe, plain = ToyPipeline(curved), ToyPipeline(curved)
    if ready is not None:
        ready.set()
    try:
        ertacache.enable(pipe, store=store, samples=SAMPLES, progress=False)
        for steps in settings:
            for seed in range(SAMPLES + 1):
                before = pipe.transformer.calls
                result = pipe("a", generator=noise(seed), num_inference_steps=steps)[0]
                if pipe.transformer.calls - before != steps // 2:
                    assert torch.equal(result, plain("a", generator=noise(seed), num_inference_steps=steps)[0])
    except Exception:
        (out / f"wrong-{time.time_ns()}").write_text(traceback.format_exc())


def start(*args: Any) -> multiprocessing.Process:
    """A process at work; it starts as a copy of this one, which has loaded everything."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(*args, ready))
    process.start()
    ready.wait()
    return process


def kill_often(kills: int, seed: int, count: int) -> dict[str, Any]:
    rng, settings = random.Random(seed), [8 + 2 * i for i in range(count)]
    files = left = stored = 0
    with tempfile.TemporaryDirectory() as folder:
        out, store, calm = Path(folder), Path(folder) / "killed", Path(folder) / "calm"
        began = time.monotonic()
        start(calm, out, settings).join()
        whole_run = time.monotonic() - began
        for turn in tqdm(range(kills), unit="kill", mininterval=1):
            shuffled = rng.sample(settings, len(settings))
            together = [start(store, out, shuffled) for _ in range(1 + turn % 2)]  # two of them want the same
            time.sleep(rng.random() * 3 * whole_run / len(settings))
            for process in together:
                process.kill()
                process.join()
            names = Store(store).names()
            for name in names:
                Calibration.load(store / name)
            files, stored = files + len(names), max(stored, len(names))
            left = max(left, sum(1 for _ in store.glob(".*")) if store.exists() else 0)
        finished_before = stored == len(settings)
        start(store, out, settings).join()
        wrong = [path.read_text() for path in out.glob("wrong-*")]
        assert not wrong, wrong[0]
        found = {name: Calibration.load(store / name) for name in Store(store).names()}
        same = found == {name: Calibration.load(calm / name) for name in Store(calm).names()}
        assert same, "the calibrations differ from those of a process that was never killed"
        first = first_calls(store, settings)
        assert first == [steps // 2 for steps in settings]
        return {
            "kills": kills,
            "settings": len(settings),
            "files_read_back": files,
            "damaged_files": 0,  # one would have ended this run, as would a wrong result or a warning
            "most_hidden_files_left": left,
            "all_stored_before_the_last_kill": finished_before,
            "stored_are_those_of_an_undisturbed_process": same,
        }


def first_calls(store: Path, settings: list[int]) -> list[int]:
    """Transformer calls of the first run at each setting."""
    pipe, calls = ToyPipeline(curved), []
    ertacache.enable(pipe, store=store, samples=SAMPLES, progress=False)
    for steps in settings:
        before = pipe.transformer.calls
        pipe("a", generator=noise(0), num_inference_steps=steps)
        calls.append(pipe.transformer.calls - before)
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill enabled pipelines at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--settings", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # threads would not live on in a copied process
    result = kill_often(chosen.kills, chosen.seed, chosen.settings)
    write("fuzz_enable", {**machine(torch.device("cpu"), torch.float32), **result}, chosen.out)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
