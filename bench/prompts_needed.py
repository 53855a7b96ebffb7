"""How many calibration prompts are enough? Held-out quality against 1, 2, 4, 8 and 16 of them.

    python bench/prompts_needed.py            every tiny pipeline there is
    python bench/prompts_needed.py flux --counts 1 2 4 --held-out 8

Each number of prompts is tried on several draws that share no prompt, since a single prompt may be lucky.
Writes bench/results/prompts_needed_<model>.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quality import HeldOut
from record import RESULTS, machine, write
from tiny_pipelines import FOLDERS, available, subject_name, tiny_pipeline

import ertacache
from ertacache.calibration import computed_steps_for
from ertacache.cli.settings import read_prompts
from ertacache.fit.cost import most_evaluations

COUNTS = (1, 2, 4, 8, 16)
SPEEDUPS = (2.0, 3.0)
DRAWS = 2


def measure(
    name: str, counts: list[int], held_out: int, draws: int, speedups: Sequence[float] = SPEEDUPS
) -> list[dict[str, Any]]:
    """One row for each number of computed steps and of calibration prompts."""
    pipe, chosen, module = tiny_pipeline(name)
    arguments = module.MODEL_FOLDER.arguments(chosen)
    steps = arguments["num_inference_steps"]
    quality = HeldOut(pipe, FOLDERS[name], arguments, held_out)
    prompts = read_prompts(chosen.path("calibration_prompts"))
    rows = []
    for speedup in speedups:
        computed = computed_steps_for(steps, speedup)
        for count in counts:
            found, seconds, predicted = [], [], []
            for draw in range(min(draws, len(prompts) // count)):
                first = draw * count
                start = time.perf_counter()
                made = ertacache.calibrate(
                    pipe,
                    prompts[first : first + count],
                    seeds=range(first, first + count),
                    computed_steps=computed,
                    micro_batch=chosen.micro_batch,
                    progress=False,
                    **arguments,
                )
                seconds.append(time.perf_counter() - start)
                found.append(quality.of(made))
                predicted.append(made.predicted["psnr"] if made.predicted else None)
            row = _row(steps, computed, count, found, predicted, seconds)
            rows.append(row)
            print(f"{name}: K={computed}, {count} prompts: {row['psnr']:.2f} dB", file=sys.stderr)
    return rows


def _row(
    steps: int, computed: int, count: int, found: list[dict[str, float]], predicted: list[Any], seconds: list[float]
) -> dict[str, Any]:
    values = [one["psnr"] for one in found]
    return {
        "num_inference_steps": steps,
        "computed_steps": computed,
        "prompts": count,
        "draws": len(found),
        "psnr": statistics.mean(values),
        "psnr_lowest": min(values),
        "psnr_highest": max(values),
        "psnr_p10": statistics.mean(one["psnr_p10"] for one in found),
        "predicted_psnr": None if None in predicted else statistics.mean(predicted),
        "evaluations": most_evaluations("balanced", count, steps, computed),
        "calibration_seconds": statistics.median(seconds),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=available(), help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--held-out", type=int, default=24, help="held-out prompts, a seed each")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--speedups", type=float, nargs="+", default=list(SPEEDUPS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    for name in options.models:
        record = {
            "model": subject_name(name),
            "held_out_prompts": options.held_out,
            "rows": measure(name, options.counts, options.held_out, options.draws, options.speedups),
            **machine(torch.device("cpu"), torch.float32),
        }
        write(f"prompts_needed_{name}", record, options.out)


if __name__ == "__main__":
    main()
