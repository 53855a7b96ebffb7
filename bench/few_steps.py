"""Does caching help models that make few steps anyway? 4 to 8 steps on the tiny pipelines.

    python bench/few_steps.py flux
    python bench/few_steps.py flux --steps 4 --held-out 4

For each number of steps N and each K below it: quality to the uncached N-step result of K computed steps out of N, and
of simply making K steps. The tiny pipelines are trained for many steps, not distilled to few, which favours neither.
Writes bench/results/few_steps_<model>.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from latency import measure as measure_latency
from quality import HeldOut
from record import RESULTS, machine, write
from subjects import caller
from tiny_pipelines import FOLDERS, available, subject_name, tiny_pipeline

import ertacache
from ertacache.cli.settings import read_prompts

STEPS = (4, 5, 6, 7, 8)


def measure(name: str, counts: list[int], held_out: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each N and K < N."""
    pipe, chosen, module = tiny_pipeline(name)
    arguments = module.MODEL_FOLDER.arguments(chosen)
    prompts = read_prompts(chosen.path("calibration_prompts"))[: chosen.num_calibration_prompts]
    rows = []
    for steps in counts:
        arguments["num_inference_steps"] = steps
        quality = HeldOut(pipe, FOLDERS[name], arguments, held_out)
        call = _timed_call(pipe, arguments, prompts[0])
        for computed in range(1, steps):
            made = ertacache.calibrate(
                pipe,
                prompts,
                seeds=range(len(prompts)),
                computed_steps=computed,
                micro_batch=chosen.micro_batch,
                progress=False,
                **arguments,
            )
            ours, fewer = quality.of(made), quality.of_fewer_steps(computed)
            times = measure_latency(pipe, call, made, repeats, torch.device("cpu"))
            rows.append(
                {
                    "num_inference_steps": steps,
                    "computed_steps": made.computed_steps,
                    **ours,
                    "predicted_psnr": made.predicted["psnr"],
                    "fewer_steps_psnr": fewer["psnr"],
                    "fewer_steps_psnr_p10": fewer["psnr_p10"],
                    **{key: times[key] for key in ("speedup", "ideal_speedup", "realised_over_ideal")},
                }
            )
            print(
                f"{name}: {computed} of {steps}: {ours['psnr']:.1f} dB, {computed} steps alone {fewer['psnr']:.1f} dB, "
                f"{times['speedup']:.2f}x",
                file=sys.stderr,
            )
    return rows


def _timed_call(pipe: Any, arguments: dict[str, Any], prompt: str) -> Any:
    rest = {key: value for key, value in arguments.items() if key != "num_inference_steps"}
    return caller(pipe, {"prompt": prompt, "output_type": "latent", **rest}, arguments["num_inference_steps"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=available(), help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--held-out", type=int, default=24, help="held-out prompts, a seed each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    for name in options.models:
        record = {
            "model": subject_name(name),
            "held_out_prompts": options.held_out,
            "rows": measure(name, options.steps, options.held_out, options.repeats),
            **machine(torch.device("cpu"), torch.float32),
        }
        write(f"few_steps_{name}", record, options.out)


if __name__ == "__main__":
    main()
