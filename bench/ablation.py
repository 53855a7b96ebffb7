"""What each part of the default brings, on every tiny pipeline; best effort is in the comparisons.

    python bench/ablation.py                 every pipeline, at two fifths of its steps
    python bench/ablation.py flux --computed-steps 14 9
    python bench/ablation.py --page          no measuring: the table in docs/method.md

Each row is the default with one thing changed. All rows run on the same held-out pairs of prompt and seed, so the
standard error is that of the difference to the default. Resumes: a row that is in bench/results/ablation_<model>.json
is not measured again.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from record import RESULTS, ROOT, machine, read, write
from tiny_pipelines import FOLDERS, available, subject_name, tiny_pipeline
from tqdm import tqdm

from compare.pages import fill, grid
from compare.recorded import linear_extrapolation, recorded_runs, uniform_schedule
from ertacache.cache import Cache, Coefficients
from ertacache.calibration import computed_steps_for
from ertacache.cli.settings import read_prompts
from ertacache.fit import least_squares
from ertacache.fit.record import Record, gram_matrix
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs, quiet
from ertacache.fit.schedule import choose_steps, path_schedule
from ertacache.fit.step_by_step import OUTPUTS, StepFit, fit_step_by_step
from ertacache.metrics import psnr

PAGE, MARKER = ROOT / "docs" / "method.md", "ablation"
SHARE = 2.5  # speed-up at which the table compares
HELD_OUT = {"flux": 24}  # prompts, with two seeds each; pictures are cheap
FEWER = 8
SEEDS = (1000, 1001)
DEFAULT = "default effort"
WITH_EMPTY = ("an empty prompt among the eight", "the same, and prompts of equal weight")

Made = tuple[list[int], Coefficients]  # the computed steps, and what each step combines


def plain(record: Record) -> Coefficients:
    """Reuse of the newest output as it is."""
    return Coefficients.of_outputs([[1.0]] * record.num_steps)


def equal_weights(record: Record, count: int) -> list[int]:
    """The schedule without the weights of early errors."""
    return path_schedule(gram_matrix(record.outputs), np.asarray(record.gains), count, OUTPUTS)


def fitted(runs: Runs, schedule: list[int], **options: Any) -> Made:
    """Stage 3 with options of its own."""
    fit = StepFit(schedule, runs.record.latents, **options)
    runs.latents(fit)
    return schedule, fit.fitted()


def unweighted(runs: Runs, schedule: list[int]) -> Made:
    """Stage 3 by plain least squares over the prompts."""
    with patch.object(least_squares, "REWEIGHTINGS", 1):
        return schedule, fit_step_by_step(runs, schedule)


VARIANTS: dict[str, Callable[[Runs, int, list[int]], Made]] = {
    DEFAULT: lambda runs, count, ours: (ours, fit_step_by_step(runs, ours)),
    "uniform steps": lambda runs, count, ours: fitted(runs, uniform_schedule(runs.record.num_steps, count)),
    "steps for errors of equal weight": lambda runs, count, ours: fitted(runs, equal_weights(runs.record, count)),
    "plain reuse": lambda runs, count, ours: (ours, plain(runs.record)),
    "linear extrapolation": lambda runs, count, ours: (ours, linear_extrapolation(runs.record, ours)),
    "three outputs": lambda runs, count, ours: fitted(runs, ours, outputs=3),
    "fitted on reused steps alone": lambda runs, count, ours: fitted(runs, ours, on_computed=False),
    "prompts of equal weight": lambda runs, count, ours: unweighted(runs, ours),
    "an empty prompt among the eight": lambda runs, count, ours: (ours, fit_step_by_step(runs, ours)),
    "the same, and prompts of equal weight": lambda runs, count, ours: unweighted(runs, ours),
}


class Pipeline:
    """A tiny pipeline with its recorded runs of calibration prompts and of held-out pairs."""

    def __init__(self, name: str, calibrating: int, held_out: int):
        self.pipe, chosen, module = tiny_pipeline(name)
        arguments = module.MODEL_FOLDER.arguments(chosen)
        options = {**arguments, "micro_batch": chosen.micro_batch}
        held = read_prompts(FOLDERS[name] / "prompts" / "held_out.txt")[:held_out]
        pairs = [(prompt, seed) for seed in SEEDS for prompt in held]
        prompts = read_prompts(chosen.path("calibration_prompts"))[:calibrating]
        self.runs, self.with_empty = (
            recorded_runs(self.pipe, texts, seeds=range(calibrating), **options)
            for texts in (prompts, [*prompts[:-1], ""])
        )
        self.held = recorded_runs(self.pipe, [p for p, _ in pairs], seeds=[s for _, s in pairs], **options)

    def values(self, variant: str, count: int) -> list[float]:
        """PSNR in dB of each held-out pair."""
        runs = self.with_empty if variant in WITH_EMPTY else self.runs
        with quiet(self.pipe), torch.no_grad():
            ours = choose_steps(runs.record, count)
            cache: Cache = Rerun(*VARIANTS[variant](runs, count, ours))
            return [round(float(v), 3) for v in psnr(self.held.pixels(cache), self.held.record.pixels)]


def measure(name: str, counts: list[int] | None, calibrating: int, held_out: int | None, out: Path) -> None:
    """Measure what is missing, and write after every row."""
    pipeline = Pipeline(name, calibrating, held_out or HELD_OUT.get(name, FEWER))
    steps = pipeline.runs.record.num_steps
    known = {(row["variant"], row["computed_steps"]): row for row in _rows(out / f"ablation_{name}.json")}
    asked = [(v, count) for count in counts or [computed_steps_for(steps, SHARE)] for v in VARIANTS]
    for variant, count in tqdm([one for one in asked if one not in known], desc=name, unit="row"):
        values = pipeline.values(variant, count)
        known[variant, count] = {"variant": variant, "computed_steps": count, "psnr": values}
        record = {
            "model": subject_name(name),
            "num_inference_steps": steps,
            "calibration_prompts": calibrating,
            "pairs": len(values),
            "rows": list(known.values()),
            **machine(torch.device("cpu"), torch.float32),
        }
        write(f"ablation_{name}", record, out)


def _rows(path: Path) -> list[dict[str, Any]]:
    return read(path.stem, path.parent)[0]["rows"] if path.exists() else []


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a variant, a column a pipeline and number of computed steps."""
    columns = [
        (record, count)
        for record in records
        for count in sorted({row["computed_steps"] for row in record["rows"]}, reverse=True)
    ]
    header = ["", *(f"{one['model']}, {count} of {one['num_inference_steps']}" for one, count in columns)]
    lines = [[variant, *(_cell(one, variant, count) for one, count in columns)] for variant in VARIANTS]
    said = "; ".join(f"{one['model']} {one['pairs']}" for one in records)
    prompts = records[0]["calibration_prompts"]
    return (
        "PSNR in dB to the uncached result, by the default, and what one change does to it, with the standard error of "
        f"the difference. Calibrated on {prompts} prompts; held-out pairs of prompt and seed: {said}.\n\n"
        f"{grid(header, lines)}"
    )


def _cell(record: dict[str, Any], variant: str, count: int) -> str:
    rows = {row["variant"]: np.array(row["psnr"]) for row in record["rows"] if row["computed_steps"] == count}
    if variant not in rows or DEFAULT not in rows:
        return "not measured"
    if variant == DEFAULT:
        return f"**{rows[variant].mean():.2f}**"
    difference = rows[variant] - rows[DEFAULT]
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return f"{difference.mean():+.2f} ± {error:.2f}".replace("-", "\N{MINUS SIGN}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=available(), help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("--computed-steps", type=int, nargs="+", help="default: two fifths of the steps")
    parser.add_argument("--prompts", type=int, default=8, help="calibration prompts")
    parser.add_argument("--held-out", type=int, help="held-out prompts, two seeds each; default 24 for FLUX, else 8")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="put the table of what there is into docs/method.md")
    parser.add_argument("--check", action="store_true", help="with --page: change nothing, exit 1 if the page differs")
    options = parser.parse_args(argv)
    for name in [] if options.page else options.models:
        measure(name, options.computed_steps, options.prompts, options.held_out, options.out)
    if options.page:
        fill(PAGE, table(read("ablation_*", options.out)), MARKER, options.check)


if __name__ == "__main__":
    sys.exit(main())
