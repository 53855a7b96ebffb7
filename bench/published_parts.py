"""The published method part by part: residual reuse, the error model, the adjusted timesteps, both.

    python bench/published_parts.py          every tiny pipeline there is
    python bench/published_parts.py --page   no measuring: the table in docs/method.md

All on the schedule of the threshold that computes N / 2 or N / 3 steps, the adjustment with both of its definitions.
Writes bench/results/published_parts_<model>.json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality import HeldOut
from record import RESULTS, ROOT, machine, read, write
from tiny_pipelines import FOLDERS, available, subject_name, tiny_pipeline

import ertacache
from compare.pages import fill, grid
from ertacache.calibration import Calibration, computed_steps_for
from ertacache.cli.settings import read_prompts
from ertacache.published import MIN_FACTOR, PHI_OVER

SPEEDUPS = (2.0, 3.0)
PAGE = ROOT / "docs" / "method.md"
MARKER = "published-parts"


def _on_the_original_grid(made: Calibration) -> Calibration:
    factors = [1.0] * made.num_inference_steps
    return replace(made, adjusted_sigmas=None, adjusted_timesteps=None, step_factors=factors)


# what is left on -> the calibration with the rest taken out
PARTS: dict[str, Callable[[Calibration], Calibration]] = {
    "residual_reuse": lambda made: replace(_on_the_original_grid(made), error_model=None),
    "with_error_model": _on_the_original_grid,
    "with_adjustment": lambda made: replace(made, error_model=None),
    "both": lambda made: made,
}
ADJUSTING = ("with_adjustment", "both")  # those that differ with what phi is measured by


def measure(name: str, calibrating: int, held_out: int) -> list[dict[str, Any]]:
    """One row for each number of computed steps."""
    pipe, chosen, module = tiny_pipeline(name)
    arguments = module.MODEL_FOLDER.arguments(chosen)
    quality = HeldOut(pipe, FOLDERS[name], arguments, held_out)
    prompts = read_prompts(chosen.path("calibration_prompts"))[:calibrating]
    rows = []
    for speedup in SPEEDUPS:
        count = computed_steps_for(arguments["num_inference_steps"], speedup)
        row: dict[str, Any] = {}
        for phi_over in PHI_OVER:
            made = ertacache.calibrate(
                pipe,
                prompts,
                seeds=range(calibrating),
                method="paper",
                computed_steps=count,
                phi_over=phi_over,
                micro_batch=chosen.micro_batch,
                progress=False,
                **arguments,
            )
            parts = {part: take for part, take in PARTS.items() if not row or part in ADJUSTING}
            psnr = {part: quality.of(take(made))["psnr"] for part, take in parts.items()}
            row = {**row, **facts(made), phi_over: {"psnr": psnr, **grid_facts(made)}}
        rows.append(row)
        print(f"{name}: {row}", file=sys.stderr)
    return rows


def facts(made: Calibration) -> dict[str, Any]:
    """The schedule."""
    return {"num_inference_steps": made.num_inference_steps, "computed_steps": made.computed_steps}


def grid_facts(made: Calibration) -> dict[str, Any]:
    """What the adjustment does to the grid: factors, and the largest step in multiples of the original one."""
    factors = [f for step, f in enumerate(made.step_factors or []) if step not in made.computed_steps]
    before, after = made.sigmas or made.timesteps, made.adjusted_sigmas or made.adjusted_timesteps or made.sigmas
    sizes = zip(before, before[1:], after, after[1:], strict=False)
    stretched = [(c - d) / (a - b) for a, b, c, d in sizes]
    return {
        "reused_steps": len(factors),
        "factors_at_the_minimum": sum(f <= MIN_FACTOR for f in factors),
        "last_step_stretched": stretched[-1],
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a pipeline and number of computed steps."""
    header = ["Pipeline", "Computed", "Residual reuse", "+ error model"]
    for over in ("\\|o_i\\|", "\\|o_i − o_(i+1)\\|"):
        header += [f"+ adjustment over {over}", "both", "phi at its minimum", "last step, times its length"]
    lines = [
        [
            record["model"],
            f"{len(row['computed_steps'])} of {row['num_inference_steps']}",
            *(f"{row[PHI_OVER[0]]['psnr'][part]:.2f}" for part in PARTS if part not in ADJUSTING),
            *(cell for phi_over in PHI_OVER for cell in _adjusted(row[phi_over])),
        ]
        for record in records
        for row in record["rows"]
    ]
    said = "; ".join(f"{one['model']} {one['calibration_prompts']}, {one['held_out_prompts']}" for one in records)
    return f"{grid(header, lines)}\n\nPrompts calibrated on, and held out: {said}."


def _adjusted(found: dict[str, Any]) -> list[str]:
    decibels = [f"{found['psnr'][part]:.2f}" for part in ADJUSTING]
    at_minimum = f"{found['factors_at_the_minimum']} of {found['reused_steps']}"
    return [*decibels, at_minimum, f"{found['last_step_stretched']:.1f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=available(), help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("--prompts", type=int, default=8, help="calibration prompts")
    parser.add_argument("--held-out", type=int, default=8, help="held-out prompts, a seed each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="put the table of what there is into docs/method.md")
    parser.add_argument("--check", action="store_true", help="with --page: change nothing, exit 1 if the page differs")
    options = parser.parse_args(argv)
    for name in [] if options.page else options.models:
        record = {
            "model": subject_name(name),
            "calibration_prompts": options.prompts,
            "held_out_prompts": options.held_out,
            "rows": measure(name, options.prompts, options.held_out),
            **machine(torch.device("cpu"), torch.float32),
        }
        write(f"published_parts_{name}", record, options.out)
    if options.page:
        fill(PAGE, table(read("published_parts_*", options.out)), MARKER, options.check)


if __name__ == "__main__":
    main()
