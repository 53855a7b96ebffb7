"""The front page's table: every model, ours beside the best rival at each cost, and the paper's rows.

python -m ertacache.overview RESULTS.json... --into README.md           put it between the markers
python -m ertacache.overview RESULTS.json... --into README.md --check   exit code 1 when the README says something else
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ertacache.results import METRICS, Row, best_rival, read_results
from ertacache.table import load_published, published_rows, replace_between

MARKER = "overview"
HEADER = [
    "Model that ran",
    "Computed",
    "Speed-up",
    "PSNR, dB",
    "LPIPS",
    "Best rival at no lower cost",
    "its PSNR",
    "its LPIPS",
]
PAPER_HEADER = ["Model", "Method", "Seconds", "PSNR, dB", "LPIPS"]


def overview_markdown(results: Sequence[Sequence[Row]], published: Mapping[str, Any]) -> str:
    """Two tables: what was measured here, and what the paper published, each labelled as what it is."""
    measured = [line for rows in results for line in _measured(rows)]
    devices = sorted({row.device for rows in results for row in rows})
    pairs = sorted({row.n for rows in results for row in rows if row.role == "ours"})
    parts = [
        f"Measured here, on the embedded tiny pipelines, on {', '.join(devices)}; {' or '.join(map(str, pairs))} pairs "
        "of held-out prompt and seed, against the uncached result of the same seed:",
        _grid(HEADER, measured),
        f"Published ({published['source']}), on the real models on {published['hardware']}; the table above is not "
        "comparable with it:",
        _grid(PAPER_HEADER, [line for rows in results for line in _paper(rows, published)]),
    ]
    return "\n\n".join(parts)


def _measured(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for steps in sorted({row.asked_steps for row in rows if row.asked_steps}, reverse=True):
        section = [row for row in rows if row.asked_steps == steps]
        ours, rival = next((r for r in section if r.role == "ours"), None), best_rival(section, "psnr")
        if ours is None:
            continue
        cells = [ours.model, f"{steps} of {ours.num_inference_steps}", f"{ours.speedup:.2f}x"]
        cells += [f"**{_shown(ours, 'psnr')}**", f"**{_shown(ours, 'lpips')}**"]
        cells += [rival.method, _shown(rival, "psnr"), _shown(rival, "lpips")] if rival else ["none", "", ""]
        lines.append(cells)
    return lines


def _paper(rows: Sequence[Row], published: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            entry["model"],
            entry["method"],
            f"{entry['seconds']:.2f}",
            *(METRICS[k].show(entry[k]) for k in ("psnr", "lpips")),
        ]
        for entry in published_rows(rows, published)
    ]


def _shown(row: Row, name: str) -> str:
    value = getattr(row, name)
    return "not measured" if value is None else METRICS[name].show(value)


def _grid(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 for a failure and for a README that --check finds to differ."""
    parser = argparse.ArgumentParser(prog="ertacache.overview", description="The front page's table.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, metavar="README.md", required=True, help="file with the two markers")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the file would change")
    options = parser.parse_args(arguments)
    try:
        content = overview_markdown([read_results(path)[0] for path in options.results], load_published())
        before = options.into.read_text(encoding="utf-8")
        after = replace_between(before, content, MARKER)
        if options.check and before != after:
            raise ValueError("differs from the results: run make figures")
        if before != after:
            options.into.write_text(after, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"ertacache.overview: {options.into}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
