"""Figures of the READMEs, made with matplotlib from the rows of results.json.

    python -m compare.plots RESULTS.json --out FOLDER          quality-psnr.png, -ssim, -lpips by counted FLOPs,
                                                                 quality-psnr-time.png and schedule.png
    python -m compare.plots RESULTS.json --out FOLDER --check  exit code 1 when the figures show other rows

Each PNG carries a hash of the rows it shows, so --check does not depend on how a machine renders text.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from compare.chart_data import (
    AXES,
    MARKERS,
    OUR_COLOUR,
    RIVAL_COLOURS,
    Series,
    linear_ticks,
    quality_series,
    rival_styles,
    spread_labels,
)
from compare.pages import ResultsError
from compare.pictures import shrink_png
from compare.results import METRICS, Row, read_results
from ertacache.cli import command

_SHAPES = dict(zip(MARKERS, ("o", "s", "^", "D", "X"), strict=True))
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlepad": 12,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}
_DATA_KEY = "ertacache-rows-sha256"


def plot_quality(rows: Sequence[Row], metric: str = "psnr", axis: str = "flops") -> Figure:
    """`metric` (psnr, ssim or lpips) of all methods against speed-up, `axis` being a key of AXES.

    Raises ValueError when no row has that metric.
    """
    series = quality_series(rows, metric, axis)
    if not series:
        raise ValueError(f"no row has a value of {metric}")
    with rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for one in series:
            x, y = zip(*one.points, strict=True)
            colour = _colour(one.style)
            width, size, alpha = (2.8, 8, 1.0) if one.ours else (1.2, 5.5, 0.85)
            marker = _marker(one)
            axes.plot(x, y, color=colour, lw=width, marker=marker, ms=size, alpha=alpha, zorder=3 if one.ours else 2)
        facts = METRICS[metric]
        if not facts.higher_is_better:
            axes.invert_yaxis()
        unit = f" ({facts.unit})" if facts.unit else ""
        axes.set(xlabel=AXES[axis], ylabel=f"{facts.label}{unit} {facts.arrow}")
        axes.set_title(f"{facts.label} against speed-up: up and to the right is better")
        _label_ends(axes, series)
    return figure


def plot_schedule(rows: Sequence[Row]) -> Figure:
    """One strip a row that has a fixed schedule: computed steps filled, reused ones light. ValueError if none has."""
    shown = [(row, row.computed_steps) for row in rows if row.computed_steps is not None and row.role != "reference"]
    if not shown:
        raise ValueError("no row has a list of computed steps")
    styles = rival_styles(rows)
    with rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(8, 0.9 + 0.32 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        for line, (row, computed) in enumerate(shown):
            colour = _colour(styles.get(row.method, len(RIVAL_COLOURS) - 1))
            for step in range(row.num_inference_steps):
                face = colour if step in computed else "#ececec"
                axes.barh(line, 0.88, left=step - 0.44, height=0.72, color=face, lw=0)
        axes.set_yticks(range(len(shown)), [f"{row.method}, {len(computed)}" for row, computed in shown])
        last = max(row.num_inference_steps for row, _ in shown) - 1
        axes.set(xlabel="Step", xlim=(-0.6, last + 0.6), ylim=(len(shown) - 0.4, -0.6))
        axes.set_xticks(linear_ticks(0, last, 7))
        axes.set_title("Computed steps (filled) and reused ones (light)")
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False)
    return figure


def save_figure(figure: Figure, path: str | Path, data_hash: str = "") -> None:
    """Write a PNG that holds no date, and the hash of the rows that it shows."""
    figure.savefig(path, dpi=160, metadata={"Software": None, _DATA_KEY: data_hash})
    shrink_png(path)


def _colour(style: int) -> str:
    return OUR_COLOUR if style < 0 else RIVAL_COLOURS[style % len(RIVAL_COLOURS)]


def _marker(series: Series) -> str:
    return "o" if series.ours else _SHAPES[MARKERS[series.style % len(MARKERS)]]


def _label_ends(axes: Axes, series: Sequence[Series]) -> None:
    """Names at the right border, beside the last points, in place of a legend; each with its marker.

    There are more methods than colours, so a name has to show its marker too.
    """
    axes.get_figure(root=True).draw_without_rendering()  # settles the layout, on which the places in pixels depend
    box, dots_a_point = axes.get_window_extent(), axes.figure.dpi / 72
    ends = [axes.transData.transform(one.points[-1]) for one in series]
    places = spread_labels([end[1] for end in ends], 13 * dots_a_point, box.y0, box.y1)
    for one, place in zip(series, places, strict=True):
        line = {
            "arrowstyle": "-",
            "color": _colour(one.style),
            "lw": 0.6,
            "alpha": 0.45,
            "shrinkA": 3,
            "shrinkB": 6,
            "relpos": (-0.12, 0.5),
        }
        height = (place - box.y0) / box.height
        axes.plot(
            [1.03],
            [height],
            transform=axes.transAxes,
            color=_colour(one.style),
            marker=_marker(one),
            ms=5.5,
            clip_on=False,
        )
        axes.annotate(
            one.method,
            one.points[-1],
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            color=_colour(one.style),
            arrowprops=line,
            fontsize=10 if one.ours else 8.5,
            fontweight="bold" if one.ours else "normal",
        )


def rows_hash(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows as JSON."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 for a failure or figures that --check finds outdated, 2 for a flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.plots", description="Figures from results.json.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a figure is out of date")
    options = parser.parse_args(arguments)
    rows, _ = read_results(options.results)
    digest = rows_hash(rows)
    for name, draw in _figures(rows).items():
        path = options.out / f"{name}.png"
        if options.check:
            with Image.open(path) as picture:
                if picture.info.get(_DATA_KEY) != digest:
                    raise ResultsError(f"{path} shows other rows than {options.results}: run make figures")
            continue
        options.out.mkdir(parents=True, exist_ok=True)
        save_figure(draw(), path, digest)


def _figures(rows: Sequence[Row]) -> dict[str, Callable[[], Figure]]:
    """Name -> what draws it."""
    figures: dict[str, Callable[[], Figure]] = {
        f"quality-{metric}": partial(plot_quality, rows, metric) for metric in METRICS if quality_series(rows, metric)
    }
    if "quality-psnr" in figures:
        figures["quality-psnr-time"] = partial(plot_quality, rows, "psnr", "speedup")
    figures["schedule"] = partial(plot_schedule, [row for row in rows if row.role == "ours"])
    return figures


if __name__ == "__main__":
    sys.exit(main())
