"""Make tables from results.json: table.md, those of report.html, and those between the markers of a README.

python -m compare.table RESULTS.json                          print them
python -m compare.table RESULTS.json --into README.md         put them between the markers
python -m compare.table RESULTS.json --into README.md --check exit code 1 when the README says something else
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.pages import fill, grid
from compare.results import METRICS, TEMPORAL_ERROR, Row, best_rival, read_results
from ertacache.cli import command

MARKER = "results"
CALIBRATED = "Calibrated, runs ↓"
_NONE = "\N{EN DASH}"


@dataclass
class Table:
    """A table of text cells; `ours` are the lines to emphasise, `remarks` and `notes` go underneath."""

    title: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)
    ours: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, cells: list[str], ours: bool = False) -> None:
        if ours:
            self.ours.append(len(self.lines))
        self.lines.append(cells)

    def note(self, text: str) -> str:
        """Return the mark of a note, the same for the same text."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"


def load_published() -> dict[str, Any]:
    """Load the paper's rows with their source and hardware."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def all_tables(rows: Sequence[Row], published: Mapping[str, Any] | None) -> list[Table]:
    """Per model: a comparison for each number of computed steps, then the paper's rows."""
    tables = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        asked = sorted({row.asked_steps for row in mine if row.asked_steps}, reverse=True)
        reference = [row for row in mine if row.role == "reference"]
        sections = [[row for row in mine if row.asked_steps == steps] for steps in asked]
        tables += [_comparison(reference, one) for one in sections]
        if published is not None:
            tables.append(_published(mine, published))
    return tables


def table_markdown(rows: Sequence[Row], published: Mapping[str, Any] | None = None, command: str | None = None) -> str:
    """Write `rows` as table.md.

    Args:
        published: what `load_published` returns; None leaves the paper's rows out.
        command: what made the rows, where that is known.
    """
    parts = [_ran_on(rows, command)] if rows else ["No results."]
    for table in all_tables(rows, published):
        lines = [
            ["**" + cell + "**" if index in table.ours else cell for cell in map(_escape, line)]
            for index, line in enumerate(table.lines)
        ]
        notes = "<br>\n".join(f"[{number}] {_escape(note)}" for number, note in enumerate(table.notes, 1))
        blocks = [f"### {_escape(table.title)}", grid(table.header, lines, left=2), *map(_escape, table.remarks), notes]
        parts.append("\n\n".join(block for block in blocks if block))
    return "\n\n".join(parts) + "\n"


def knob_text(row: Row) -> str:
    """What was tuned and its value, for example `threshold 0.12`."""
    pairs = (row.knob or {}).items()
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs) or _NONE


def margins(section: Sequence[Row], ours: Row | None = None) -> list[tuple[str, str, str]]:
    """Ours minus the best comparable rival, per metric: (label, signed difference with unit, that rival's method).

    Args:
        ours: the row; the first one of ours by default.
    """
    found = []
    ours = ours or next((row for row in section if row.role == "ours"), None)
    for name, metric in METRICS.items():
        for field_name, label in ((name, metric.label), (f"{name}_p10", f"{metric.label} p10")):
            rival = best_rival(section, field_name)
            if ours is None or rival is None or getattr(ours, field_name) is None:
                continue
            difference = metric.show(getattr(ours, field_name) - getattr(rival, field_name), sign=True)
            found.append((label, f"{difference} {metric.unit}".strip(), rival.method))
    return found


def margin_text(section: Sequence[Row], ours: Row) -> str:
    """One line with the margin of a row of ours in every metric over the best comparable rival in it."""
    found = margins(section, ours)
    if not found:
        return "Margin: no rival reached a comparable cost."
    line = "; ".join(f"{label} {difference} ({method})" for label, difference, method in found)
    return f"Margin of {ours.method} over the best comparable rival in each metric: {line}."


def _comparison(reference: Sequence[Row], section: Sequence[Row]) -> Table:
    shown = list(section)
    # ours first, then the compared rivals from best to worst, then those that could not reach the cost
    shown.sort(key=lambda r: (r.role != "ours", not r.compared, -(r.psnr if r.psnr is not None else -1e9)))
    lead = next((row for row in shown if row.role == "ours"), shown[0])
    title = f"{lead.model}: {lead.asked_steps} of {lead.num_inference_steps} steps computed"
    temporal = any(row.temporal_error is not None for row in shown)
    counted = any(row.calibration_runs is not None for row in shown)
    table = Table(title, _header(["Method", "Knob", *([CALIBRATED] if counted else [])], temporal))
    for row in [*reference, *shown]:
        method = row.method
        if row.form:
            method += " " + table.note(f"{row.method}: {row.form}")
        if row.role == "rival" and not row.comparable:
            method += " " + table.note("does not reach the asked cost: shown at its nearest, not compared")
        elif row.role == "rival" and not row.compared:
            method += " " + table.note("its calibration took more uncached runs than our best effort: not compared")
        cells = [method, knob_text(row), *([_runs_text(row)] if counted else [])]
        table.add([*cells, *_measured(row, table, temporal)], row.role == "ours")
    table.remarks += [margin_text(shown, row) for row in shown if row.role == "ours"]
    return table


def _runs_text(row: Row) -> str:
    return _NONE if row.calibration_runs is None else f"{row.calibration_runs:.0f}"


def published_rows(rows: Sequence[Row], published: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The paper's rows for the model of `rows`, or for all models if none matches."""
    name = "".join(c for c in rows[0].model.lower() if c.isalnum())
    return [p for p in published["rows"] if any(word in name for word in p["match"])] or published["rows"]


def _published(rows: Sequence[Row], published: Mapping[str, Any]) -> Table:
    """The paper's rows of this model beside ours."""
    matching = published_rows(rows, published)
    header = ["Method", "Model that ran", "Hardware", "Seconds ↓"]
    header += [f"{metric.label} {metric.arrow}" for metric in METRICS.values()]
    table = Table(f"{rows[0].model}: published and measured here", header)
    for entry in matching:
        values = [metric.show(entry[key]) for key, metric in METRICS.items()]
        where = [f"{entry['model']}, the real model", published["hardware"]]
        table.add([f"{entry['method']} (published)", *where, f"{entry['seconds']:.2f}", *values])
    for row in rows:
        if row.role == "ours":
            cells = [f"{row.method} at cost {row.compute_fraction:.2f} (measured here)", row.model, row.device]
            table.add([*cells, _seconds(row), *(_metric(row, key, table) for key in METRICS)], ours=True)
    table.remarks.append(
        f"Published rows: {published['source']}, on the real model on {published['hardware']}. Rows "
        "measured here: on the model that is named in them. The two are not comparable."
    )
    return table


def _header(first: list[str], temporal: bool) -> list[str]:
    metrics = [f"{m.label}{', ' + m.unit if m.unit else ''} {m.arrow} (p10)" for m in METRICS.values()]
    extra = [f"{TEMPORAL_ERROR.label} {TEMPORAL_ERROR.arrow}"] if temporal else []
    return [*first, "Cost ↓", "Seconds ↓", "Speed-up ↑", *metrics, *extra]


def _measured(row: Row, table: Table, temporal: bool) -> list[str]:
    cells = [f"{row.compute_fraction:.3f}", _seconds(row), f"{row.speedup:.2f}x"]
    if row.role == "reference":
        return cells + ["reference"] * (len(METRICS) + temporal)
    cells += [_metric(row, key, table, worst=True) for key in METRICS]
    if temporal:
        cells.append(_NONE if row.temporal_error is None else TEMPORAL_ERROR.show(row.temporal_error))
    return cells


def _metric(row: Row, key: str, table: Table, worst: bool = False) -> str:
    value, metric = getattr(row, key), METRICS[key]
    if value is None:
        return f"{_NONE} {table.note(f'{metric.label} not measured: {row.reasons[key]}')}"
    low = getattr(row, f"{key}_p10")
    return metric.show(value) + (f" ({metric.show(low)})" if worst and low is not None else "")


def _seconds(row: Row) -> str:
    return f"{row.denoise_seconds:.3g}" if row.denoise_seconds < 100 else f"{row.denoise_seconds:.0f}"


def _ran_on(rows: Sequence[Row], command: str | None) -> str:
    runs = dict.fromkeys(
        f"{r.model} ({r.dtype}) on {r.device}, {r.num_inference_steps} steps, {r.n} prompt and seed pairs"
        for r in rows
        if r.role in ("reference", "ours")
    )
    text = "Measured against the uncached output of the same prompt and seed. Cost: fraction of the uncached run's "
    text += (
        "transformer FLOPs. Seconds: denoising loop per prompt, wall clock, median of interleaved repeats. p10: worst "
    )
    text += "decile. Rows of a later run have the uncached seconds over the speed-up that it measured."
    made_by = [f"Made by `{' '.join(command.replace('`', '').split())}`."] if command else []
    return "\n\n".join([*map(_escape, runs), text, *made_by])


def _escape(text: str) -> str:
    """Text that cannot break a Markdown table or become HTML."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\|*_`":
        text = text.replace(character, "\\" + character)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 1 for a failure or a README that differs, 2 for a wrong flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.table", description="Tables from results.json.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, metavar="README.md", help="file with the two markers")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the file would change")
    options = parser.parse_args(arguments)
    if options.check and options.into is None:
        parser.error("--check needs --into")
    rows, meta = read_results(options.results)
    markdown = table_markdown(rows, load_published(), meta.get("command"))
    if options.into is None:
        print(markdown, end="")
    else:
        fill(options.into, markdown, MARKER, options.check)


if __name__ == "__main__":
    sys.exit(main())
