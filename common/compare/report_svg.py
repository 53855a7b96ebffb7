"""The charts of report.html as inline SVG text. Colours are CSS classes of report.css, so light and dark mode work.

Every chart is drawn for a given width in pixels; the report holds a wide one and a narrow one for phones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from compare.chart_data import (
    AXES,
    CHARTED,
    MARKERS,
    RIVAL_COLOURS,
    Series,
    linear_ticks,
    log_range,
    padded,
    quality_series,
    spread_labels,
    tick_texts,
)
from compare.results import Curve, Row

_LABEL_GAP = 14
_LEFT, _TOP, _BOTTOM = 68, 14, 44


class _Frame:
    """The plotting area of one chart and the SVG parts drawn so far."""

    def __init__(self, width: int, height: int, title: str, labels: Sequence[str]):
        self.width, self.height, self.title = width, height, title
        # the names stand right of the area: as much room as the longest one needs, 6.6 px a letter, and its marker
        gutter = 38 + 6.6 * max(map(len, labels), default=0)
        self.x0, self.x1 = _LEFT, width - min(gutter, width * 0.42)
        self.y0, self.y1 = _TOP, height - _BOTTOM
        self.parts: list[str] = []

    def scale_x(self, low: float, high: float) -> Callable[[float], float]:
        return lambda value: self.x0 + (value - low) / (high - low) * (self.x1 - self.x0)

    def scale_y(self, low: float, high: float, inverted: bool = False) -> Callable[[float], float]:
        if inverted:
            low, high = high, low
        return lambda value: self.y1 - (value - low) / (high - low) * (self.y1 - self.y0)

    def text(self, x: float, y: float, text: str, kind: str, extra: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {extra}>{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def axes(
        self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str
    ) -> None:
        """Grid lines, tick labels (place in pixels, text) and axis labels."""
        for y, text in y_ticks:
            self.line([(self.x0, y), (self.x1, y)], "grid")
            self.text(self.x0 - 7, y + 4, text, "tick", 'text-anchor="end"')
        for x, text in x_ticks:
            self.line([(x, self.y1), (x, self.y1 + 4)], "grid")
            self.text(x, self.y1 + 18, text, "tick", 'text-anchor="middle"')
        self.text((self.x0 + self.x1) / 2, self.height - 6, x_label, "axis", 'text-anchor="middle"')
        middle = (self.y0 + self.y1) / 2
        turn = f'text-anchor="middle" transform="rotate(-90 12 {middle:.1f})"'
        self.text(12, middle, y_label, "axis", turn)

    def name(self, text: str, y: float, after: float = 13) -> str:
        """A method's name as SVG text, `after` pixels right of the area, cut to the room that is there."""
        room = int((self.width - self.x1 - after) / 6.6)
        shown = text if len(text) <= room else text[: room - 1] + "\N{HORIZONTAL ELLIPSIS}"
        return f'<text class="name" x="{self.x1 + after:.1f}" y="{y:.1f}">{escape(shown)}</text>'

    def names(self, ends: Sequence[tuple[Series, float, float]], markers: bool = False) -> dict[str, str]:
        """For each series its name right of the area with a leader from its last point, as SVG text.

        With `markers` a name shows its marker too, since there are more methods than colours.
        """
        places = spread_labels([y for _, _, y in ends], _LABEL_GAP, self.y0 + 4, self.y1 - 2)
        found = {}
        for (series, x, y), place in zip(ends, places, strict=True):
            leader = f'<path class="leader" d="M{x + 5:.1f} {y:.1f}L{self.x1 + 4:.1f} {place:.1f}h6"/>'
            if markers:
                leader += f'<path class="dot" d="{_marker(series, self.x1 + 17, place)}"/>'
            found[series.method] = leader + self.name(series.method, place + 4, 27 if markers else 13)
        return found

    def svg(self) -> str:
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
        return head + "".join(self.parts) + "</svg>"


def quality_svg(rows: Sequence[Row], metric: str, axis: str, width: int, height: int = 400) -> str:
    """`metric` against speed-up for all methods; empty text when no row has that metric."""
    series = quality_series(rows, metric, axis)
    if not series:
        return ""
    facts = CHARTED[metric]
    frame = _Frame(width, height, f"{facts.label} against speed-up", [one.method for one in series])
    x_low, x_high = padded([x for one in series for x, _ in one.points])
    y_low, y_high = padded([y for one in series for _, y in one.points])
    to_x = frame.scale_x(x_low, x_high)
    to_y = frame.scale_y(y_low, y_high, inverted=not facts.higher_is_better)
    x_ticks, y_ticks = linear_ticks(x_low, x_high, 5 if width > 500 else 3), linear_ticks(y_low, y_high)
    frame.axes(
        [(to_x(v), f"{text}×") for v, text in zip(x_ticks, tick_texts(x_ticks), strict=True)],
        [(to_y(v), text) for v, text in zip(y_ticks, tick_texts(y_ticks), strict=True)],
        AXES[axis],
        f"{facts.label}{' in ' + facts.unit if facts.unit else ''}, up is better",
    )
    drawn = [[(to_x(x), to_y(y)) for x, y in one.points] for one in series]
    names = frame.names([(one, *points[-1]) for one, points in zip(series, drawn, strict=True)], markers=True)
    for one, points in zip(series, drawn, strict=True):
        frame.parts.append(f'<g class="series {_class(one.style)}">')
        frame.line(points, "line")
        for (x, y), (speed, value) in zip(points, one.points, strict=True):
            tip = f"{one.method}: {facts.label} {facts.show(value)} {facts.unit} at {speed:.2f}×"
            frame.parts.append(f'<path class="dot" d="{_marker(one, x, y)}"><title>{escape(tip)}</title></path>')
        frame.parts.append(names[one.method] + "</g>")
    return frame.svg()


def error_svg(curves: Mapping[str, Curve], styles: Mapping[str, int], width: int, height: int = 320) -> str:
    """Error of the latents per step, log scale; the steps that ours (style -1) reuses are shaded."""
    frame = _Frame(width, height, "Error per step against the uncached run", list(curves))
    low, high = log_range(curves)
    steps = max(len(curve.error) for curve in curves.values())
    to_x = frame.scale_x(-0.5, steps - 0.5)
    to_log_y = frame.scale_y(math.log10(low), math.log10(high))
    for method, curve in curves.items():
        if styles.get(method) == -1 and curve.computed_steps is not None:
            frame.parts += _shades(len(curve.error), curve.computed_steps, to_x, frame)
    exponents = range(round(math.log10(low)), round(math.log10(high)) + 1)
    frame.axes(
        [(to_x(round(s)), f"{s:g}") for s in linear_ticks(0, steps - 1, 7 if width > 500 else 4) if s == round(s)],
        [(to_log_y(e), f"{10.0**e:g}") for e in exponents],
        "Step (shaded: reused by ours)",
        "RMS error, down is better",
    )
    ends, drawn = [], {}
    for method, curve in sorted(curves.items(), key=lambda item: styles.get(item[0], 0) < 0):
        # a value below the axis (often an exact zero at the first step) is drawn on its lower border
        points = [(to_x(s), to_log_y(math.log10(max(e, low)))) for s, e in enumerate(curve.error)]
        series = Series(method, styles.get(method, 0), [])
        drawn[method] = (series, points)
        ends.append((series, *points[-1]))
    names = frame.names(ends)
    for method, (series, points) in drawn.items():
        frame.parts.append(f'<g class="series {_class(series.style)}">')
        frame.line(points, "line")
        tip = f"<title>{escape(f'{method}: {curves[method].error[-1]:.3g} after the last step')}</title>"
        frame.parts.append(tip + names[method] + "</g>")
    return frame.svg()


def schedule_svg(lines: Sequence[tuple[str, Sequence[int], int]], num_steps: int, width: int) -> str:
    """Strips of (method, computed steps, style): computed steps filled, reused ones light."""
    frame = _Frame(width, 26 * len(lines) + 34, "Computed and reused steps", [name for name, _, _ in lines])
    to_x = frame.scale_x(-0.5, num_steps - 0.5)
    cell = (frame.x1 - frame.x0) / num_steps
    for index, (name, computed, style) in enumerate(lines):
        y = 4 + 26 * index
        frame.parts.append(f'<g class="{_class(style)}">')
        for step in range(num_steps):
            state = "computed" if step in set(computed) else "reused"
            place = f'x="{to_x(step) - cell * 0.44:.1f}" y="{y}" width="{cell * 0.88:.1f}" height="18"'
            frame.parts.append(f'<rect class="{state}" rx="3" {place}><title>step {step}: {state}</title></rect>')
        frame.parts.append(frame.name(name, y + 13) + "</g>")
    for tick in linear_ticks(0, num_steps - 1, 7 if width > 500 else 4):
        frame.text(to_x(tick), 26 * len(lines) + 20, f"{tick:g}", "tick", 'text-anchor="middle"')
    return frame.svg()


def _shades(num_steps: int, computed: Sequence[int], to_x: Callable[[float], float], frame: _Frame) -> list[str]:
    width = to_x(1) - to_x(0)
    return [
        f'<rect class="shade" x="{to_x(step - 0.5):.1f}" y="{frame.y0}" width="{width:.1f}" '
        f'height="{frame.y1 - frame.y0}"/>'
        for step in sorted(set(range(num_steps)) - set(computed))
    ]


def _class(style: int) -> str:
    return "ours" if style < 0 else f"c{style % len(RIVAL_COLOURS)}"


def _marker(series: Series, x: float, y: float) -> str:
    """The path of one marker centred on (x, y)."""
    shape, r = ("circle", 6.5) if series.ours else (MARKERS[series.style % len(MARKERS)], 4.5)
    if shape == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    outlines: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "cross": [
            (-0.4, -1.2),
            (0.4, -1.2),
            (0.4, -0.4),
            (1.2, -0.4),
            (1.2, 0.4),
            (0.4, 0.4),
            (0.4, 1.2),
            (-0.4, 1.2),
            (-0.4, 0.4),
            (-1.2, 0.4),
            (-1.2, -0.4),
            (-0.4, -0.4),
        ],
    }
    return "M" + "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in outlines[shape]) + "z"
