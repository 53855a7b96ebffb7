"""Figures of docs/speed.md. Each PNG carries a hash of the results it shows, so that a stale one is noticed."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from record import ROOT, read

from compare.pictures import shrink_png

DOCS = ROOT / "docs"
KEY = "ertacache-results-sha256"
STAGES = {"record": "recording", "gram": "Gram matrix", "policy": "policy", "fit": "fitting"}


def scaling(records: Sequence[dict[str, Any]]) -> Figure:
    """Seconds of each stage over what grows, a panel each, both axes logarithmic."""
    series = records[0]["series"]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(series), sharey=True)
    for axes, one in zip(panels, series, strict=True):
        for stage, label in STAGES.items():
            axes.loglog(one["numbers"], one["seconds"][stage], marker="o", ms=3, label=label)
        axes.set(xlabel=one["varied"], xticks=one["numbers"], xticklabels=map(str, one["numbers"]))
        axes.tick_params("x", which="both", labelsize=7, rotation=45)
        axes.xaxis.set_minor_formatter(NullFormatter())  # ticks are what was measured, and no others
        axes.grid(color="#e6e6e6")
    panels[0].set(ylabel="seconds")
    panels[0].legend(fontsize=7)
    return figure


def models(records: Sequence[dict[str, Any]]) -> tuple[Figure, list[Axes]]:
    """A panel for each record, two in a row, named after its model."""
    rows = -(-len(records) // 2)
    columns = min(len(records), 2)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, record in zip(panels, records, strict=False):
        axes.set_title(record["model"], fontsize=9)
        axes.grid(color="#e6e6e6")
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    return figure, panels[: len(records)]


def prompts(records: Sequence[dict[str, Any]]) -> Figure:
    """Held-out PSNR over the number of calibration prompts; bars reach from the lowest to the highest draw."""
    figure, panels = models(records)
    for axes, record in zip(panels, records, strict=True):
        for computed in dict.fromkeys(row["computed_steps"] for row in record["rows"]):
            rows = [row for row in record["rows"] if row["computed_steps"] == computed]
            middle = [row["psnr"] for row in rows]
            below = [row["psnr"] - row["psnr_lowest"] for row in rows]
            above = [row["psnr_highest"] - row["psnr"] for row in rows]
            label = f"{computed} of {rows[0]['num_inference_steps']} steps"
            counts = [row["prompts"] for row in rows]
            axes.errorbar(counts, middle, yerr=[below, above], marker="o", capsize=3, label=label)
        axes.set_xscale("log", base=2)
        counts = sorted({row["prompts"] for row in record["rows"]})
        axes.set_xticks(counts, list(map(str, counts)))  # as numbers of prompts, not as powers of two
        axes.set(xlabel="calibration prompts", ylabel="held-out PSNR (dB)")
        axes.legend(fontsize=7)
    return figure


def few_steps(records: Sequence[dict[str, Any]]) -> Figure:
    """PSNR to the N-step result over speed-up: ours as measured, solid; K plain steps at their ideal one, dashed.

    A legend entry for each N, and one for each of the two kinds of line.
    """
    figure, panels = models(records)
    for axes, record in zip(panels, records, strict=True):
        for index, steps in enumerate(dict.fromkeys(row["num_inference_steps"] for row in record["rows"])):
            rows = [row for row in record["rows"] if row["num_inference_steps"] == steps]
            colour = f"C{index}"
            axes.plot([r["speedup"] for r in rows], [r["psnr"] for r in rows], "o-", color=colour, label=f"N = {steps}")
            axes.plot([r["ideal_speedup"] for r in rows], [r["fewer_steps_psnr"] for r in rows], "x--", color=colour)
        axes.plot([], [], "o-", color="black", label="ERTACache, measured")
        axes.plot([], [], "x--", color="black", label="K plain steps, at the ideal N / K")
        axes.set(xlabel="speed-up", ylabel="PSNR to the N-step result (dB)")
        axes.legend(fontsize=7)
    return figure


FIGURES: dict[str, tuple[Callable[[Sequence[dict[str, Any]]], Figure], str]] = {
    "speed-scaling.png": (scaling, "scaling"),
    "speed-prompts.png": (prompts, "prompts_needed_*"),
    "speed-few-steps.png": (few_steps, "few_steps_*"),
}


def _hash(records: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def is_current(name: str) -> bool:
    """Whether the figure shows the present results; one without results is not to be there."""
    path: Path = DOCS / name
    records = read(FIGURES[name][1])
    if not records or not path.exists():
        return not records and not path.exists()
    with Image.open(path) as picture:
        return picture.info.get(KEY) == _hash(records)


def draw(name: str) -> None:
    """Draw the figure, or remove it where its results are gone."""
    records = read(FIGURES[name][1])
    if records:
        FIGURES[name][0](records).savefig(DOCS / name, dpi=110, metadata={KEY: _hash(records), "Software": None})
        shrink_png(DOCS / name)
    else:
        (DOCS / name).unlink(missing_ok=True)
