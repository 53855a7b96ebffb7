"""Shared by the charts of plots.py (matplotlib) and report_svg.py (the report): series, colours, label places."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compare.results import METRICS, TEMPORAL_ERROR, Curve, Metric, Row

# Okabe and Ito's palette, which colour-blind readers can tell apart. Ours has vermilion for itself.
OUR_COLOUR = "#D55E00"
RIVAL_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#7F7F7F")
# 6 colours against 5 markers: thirty rivals differ in at least one of the two
MARKERS = ("circle", "square", "triangle", "diamond", "cross")

# what can be drawn against speed-up; of videos also the error of the changes from frame to frame
CHARTED: dict[str, Metric] = {**METRICS, "temporal_error": TEMPORAL_ERROR}

# the first one is shown first: counted FLOPs are the same on every machine, times of a small model on a CPU are not
AXES = {"flops": "Speed-up by FLOPs counted (×)", "speedup": "Speed-up, measured (×)"}


@dataclass(frozen=True)
class Series:
    """One method's points, from most computed steps to fewest; `style` picks colour and marker, -1 is ours."""

    method: str
    style: int
    points: list[tuple[float, float]]

    @property
    def ours(self) -> bool:
        return self.style < 0


def rival_styles(rows: Sequence[Row]) -> dict[str, int]:
    """Style numbers by method, the same in every chart of these rows: -1 ours, 0 the best rival, and so on."""
    ours = {row.method for row in rows if row.role == "ours"}
    best: dict[str, float] = {}
    for row in rows:
        if row.role == "rival" and row.method not in ours:
            best[row.method] = max(row.psnr or 0.0, best.get(row.method, 0.0))
    rivals = sorted(best, key=lambda method: (-best[method], method))
    return {**dict.fromkeys(sorted(ours), -1), **{method: index for index, method in enumerate(rivals)}}


def quality_series(rows: Sequence[Row], metric: str, axis: str = "flops") -> list[Series]:
    """`metric` (a key of CHARTED) against speed-up, one series per method, ours last so it is drawn on top.

    Points are joined in the order of computed steps; measured times may cross if two costs are near.
    """
    series = []
    ordered = sorted(rows, key=lambda row: -(row.asked_steps or row.num_inference_steps))
    for method, style in rival_styles(rows).items():
        points = [
            (row.speedup if axis == "speedup" else 1 / row.compute_fraction, getattr(row, metric))
            for row in ordered
            if row.method == method and row.role in ("ours", "rival") and getattr(row, metric) is not None
        ]
        if points:
            series.append(Series(method, style, list(dict.fromkeys(points))))
    return sorted(series, key=lambda s: s.ours)


def curve_at(curves: Mapping[str, Curve | Sequence[Curve]], asked_steps: int | None) -> dict[str, Curve]:
    """Each method's curve at one number of computed steps; a curve that names none belongs to all."""
    chosen: dict[str, Curve] = {}
    for method, several in curves.items():
        for curve in [several] if isinstance(several, Curve) else several:
            if curve.asked_steps in (asked_steps, None) and len(curve.error):
                chosen[method] = curve
    return chosen


def spread_labels(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label places at least `gap` apart within [low, high], least squares; closer only if they cannot fit.

    Without the gaps this is a monotone regression: labels that touch move as one block.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    blocks: list[tuple[float, int]] = []  # (mean, count)
    for rank, index in enumerate(order):
        mean, count = places[index] - rank * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    top = high - gap * (len(places) - 1)
    result = [0.0] * len(places)
    for rank, index in enumerate(order):
        result[index] = min(max(means[rank], low), top) + rank * gap
    return result


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `count` of them."""
    rough = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Format ticks with as many decimals as their distance needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{decimals}f}" for tick in ticks]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Range of the values, widened by `share` on both sides; never empty."""
    low, high = min(values), max(values)
    pad = (high - low) * share or max(abs(high) * share, 0.1)
    return low - pad, high + pad


def log_range(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Powers of ten around the curves' errors, without exact zeros."""
    errors = [error for curve in curves.values() for error in curve.error if error > 0] or [1.0]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    # six decades tell the methods apart; rounding noise of the first steps below them would squeeze the rest
    return 10.0 ** max(low, high - 6), 10.0 ** max(high, low + 1)
