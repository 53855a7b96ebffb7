"""What a reused step costs in percent of a computed one, inside one run: `python bench/step_cost.py FOLDER`.

Writes bench/results/step_cost_<folder>.json. Uses the folder's tiny pipeline on a CPU, or with --model another one.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import ertacache
from ertacache import provenance, settings
from ertacache.calibration import Calibration
from ertacache.files import write_atomically
from ertacache.kept import obtain_calibration

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 7


def step_seconds(pipe: Any, arguments: dict[str, Any], prompt: str) -> list[float]:
    """Seconds of each step of one run, everything of the pipeline's loop included."""
    marks: list[float] = []

    def mark(_: Any, __: int, ___: Any, state: dict[str, Any]) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return state

    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        pipe(prompt=prompt, generator=generator, output_type="latent", callback_on_step_end=mark, **arguments)
    return [b - a for a, b in pairwise(marks)]


def measure(pipe: Any, arguments: dict[str, Any], prompt: str, calibration: Calibration) -> dict[str, Any]:
    """Medians over all computed and all reused steps of several runs, step 0 left out."""
    computed, reused = [], []
    with ertacache.apply(pipe, calibration):
        for repeat in range(REPEATS + 1):
            for step, seconds in enumerate(step_seconds(pipe, arguments, prompt), start=1):
                if repeat > 0:  # the first run warms up
                    (computed if step in calibration.computed_steps else reused).append(seconds)
    fresh, cached = statistics.median(computed), statistics.median(reused)
    return {
        "computed_step_seconds": fresh,
        "reused_step_seconds": cached,
        "reused_percent_of_computed": 100 * cached / fresh,
        "runs": REPEATS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    folder = args.folder.resolve()
    sys.path.insert(0, str(folder))
    import generate

    chosen = settings.parse(folder, ["--model", args.model], "")
    chosen.compare = False
    pipe = generate.load(chosen)
    pipe.set_progress_bar_config(disable=True)
    calibration, _ = obtain_calibration(pipe, chosen, generate.MODEL_FOLDER)
    arguments = generate.MODEL_FOLDER.arguments(chosen)
    record = {
        "model": f"{folder.name} {chosen.model}",
        "num_inference_steps": calibration.num_inference_steps,
        "computed_steps": calibration.computed_steps,
        **measure(pipe, arguments, settings.prompts_of(chosen)[0], calibration),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": chosen.dtype,
        "versions": provenance.package_versions(),
    }
    path = ROOT / "bench" / "results" / f"step_cost_{folder.name}.json"
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
