"""The front page's table: every model, ours beside the best rival at each cost, and the paper's rows.

python -m compare.overview RESULTS.json... --into README.md           put it between the markers
python -m compare.overview RESULTS.json... --into README.md --check   exit code 1 when the README says something else
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.pages import fill, grid
from compare.results import COMPARABLE_BAND, METRICS, Row, best_rival, metric_text, read_results
from compare.table import load_published, published_rows
from ertacache.cli import command

MARKER = "overview"
PREDICTED = "Predicted, dB"  # a column where a comparison kept what its calibrations promised
HEADER = ["Model that ran", "Computed", "Speed-up", PREDICTED, "PSNR, dB", "LPIPS"]
HEADER += ["Best rival at a comparable cost", "its speed-up", "its PSNR", "its LPIPS"]
PAPER_HEADER = ["Model", "Method", "Seconds", "PSNR, dB", "LPIPS"]


def overview_markdown(
    results: Sequence[Sequence[Row]], published: Mapping[str, Any], metas: Sequence[Mapping[str, Any]]
) -> str:
    """Two tables: what was measured here, and what the paper published, each labelled as what it is.

    Args:
        results: rows of one model each.
        published: what `load_published` returns.
        metas: what lies beside each of the results; `predicted` is the PSNR in dB by asked number of computed steps.
    """
    predictions = [meta.get("predicted") or {} for meta in metas]
    measured = [line for rows, known in zip(results, predictions, strict=True) for line in _measured(rows, known)]
    header = HEADER
    if not any(predictions):
        column = HEADER.index(PREDICTED)
        header, *measured = [line[:column] + line[column + 1 :] for line in (HEADER, *measured)]
    devices = sorted({row.device for rows in results for row in rows})
    pairs = sorted({row.n for rows in results for row in rows if row.role == "ours"})
    parts = [
        f"Measured here, on the embedded tiny pipelines, on {', '.join(devices)}; {' or '.join(map(str, pairs))} pairs "
        "of held-out prompt and seed, against the uncached result of the same seed:",
        grid(header, measured, left=2),
        "Speed-ups are counted: transformer FLOPs of the uncached run over those of the method. Rivals are tuned on "
        f"calibration prompts to a cost between ours and {COMPARABLE_BAND:g} more (of the uncached run's), which may "
        "come out a little beside that on held-out ones.",
        f"Published ({published['source']}), on the real models on {published['hardware']}; the table above is not "
        "comparable with it:",
        grid(PAPER_HEADER, [line for rows in results for line in _paper(rows, published)], left=2),
    ]
    return "\n\n".join(parts)


def _measured(rows: Sequence[Row], predicted: Mapping[str, float]) -> list[list[str]]:
    lines = []
    for steps in sorted({row.asked_steps for row in rows if row.asked_steps}, reverse=True):
        section = [row for row in rows if row.asked_steps == steps]
        ours, rival = next((r for r in section if r.role == "ours"), None), best_rival(section, "psnr")
        if ours is None:
            continue
        promised = predicted.get(str(steps))
        cells = [ours.model, f"{steps} of {ours.num_inference_steps}", _counted(ours)]
        cells.append("not kept" if promised is None else METRICS["psnr"].show(promised))
        cells += [f"**{metric_text(ours, 'psnr')}**", f"**{metric_text(ours, 'lpips')}**"]
        others = ("psnr", "lpips")
        cells += (
            [rival.method, _counted(rival), *(metric_text(rival, k) for k in others)] if rival else ["none"] + [""] * 3
        )
        lines.append(cells)
    return lines


def _counted(row: Row) -> str:
    """Speed-up by counted FLOPs of the transformer: that of a loop in which nothing else takes time."""
    return f"{1 / row.compute_fraction:.2f}x"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 for a failure or a README that --check finds to differ, 2 for a flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.overview", description="The front page's table.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, metavar="README.md", required=True, help="file with the two markers")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the file would change")
    options = parser.parse_args(arguments)
    results, metas = zip(*map(read_results, options.results), strict=True)
    content = overview_markdown(results, load_published(), metas)
    fill(options.into, content, MARKER, options.check)


if __name__ == "__main__":
    sys.exit(main())
