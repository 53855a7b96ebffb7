"""Fill the generated parts of the README: the table of results, and a schedule as text.

python -m compare.overview RESULTS.json... --into README.md           put them between the markers
python -m compare.overview RESULTS.json... --into README.md --check   exit code 1 when the README says something else
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.pages import fill, grid
from compare.results import COMPARABLE_BAND, METRICS, Row, best_rival, metric_text, read_results
from ertacache.cli import command

MARKER, STRIP_MARKER = "overview", "schedule"
OURS = {"ertacache": "Default, dB", "ertacache-best": "Best effort, dB"}  # methods and their columns
DEFAULT = "ertacache"


def overview_markdown(results: Sequence[Sequence[Row]], metas: Sequence[Mapping[str, Any]]) -> str:
    """One line for each model and number of computed steps: our PSNR at both efforts beside the best rival's.

    Args:
        results: the rows of each model.
        metas: what lies beside each of the results; `predicted` is the PSNR in dB by method and computed steps, or by
            computed steps alone in older ones.
    """
    devices = sorted({row.device for rows in results for row in rows})
    pairs = sorted({row.n for rows in results for row in rows if row.role == "ours"})
    parts = [
        f"PSNR to the uncached result of the same prompt and seed: {' or '.join(map(str, pairs))} held-out pairs, on "
        f"{', '.join(devices)}.",
        _table(results),
        "Speed-up is counted: transformer FLOPs of the uncached run over those of the method. Every rival is tuned to "
        f"cost as much as ours, or up to {COMPARABLE_BAND:g} of an uncached run more. {_predictions(results, metas)}",
    ]
    return "\n\n".join(part.rstrip() for part in parts)


def strip_markdown(rows: Sequence[Row]) -> str:
    """The schedule of the first row of ours, as one character a step."""
    ours = next(row for row in rows if row.role == "ours" and row.computed_steps)
    steps, computed = ours.num_inference_steps, set(ours.computed_steps or ())
    strip = "".join("#" if step in computed else "." for step in range(steps))
    return f"```text\n{strip}    {ours.model}: {len(computed)} of {steps} steps computed (#), the rest reused (.)\n```"


def _sections(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each number of computed steps that has one of ours, the most steps first."""
    asked = sorted({row.asked_steps for row in rows if row.asked_steps and row.role == "ours"}, reverse=True)
    return [[row for row in rows if row.asked_steps == steps] for steps in asked]


def _ours(section: Sequence[Row], method: str = DEFAULT) -> Row | None:
    return next((row for row in section if row.role == "ours" and row.method == method), None)


def _table(results: Sequence[Sequence[Row]]) -> str:
    """Both efforts in columns of their own where both were measured; results of one alone do not say which it was."""
    measured = {row.method for rows in results for row in rows}
    methods = OURS if measured >= OURS.keys() else {DEFAULT: "ERTACache, dB"}
    header = ["Model", "Computed", "Speed-up", *methods.values(), "Best rival", "its dB"]
    return grid(header, [_line(section, list(methods)) for rows in results for section in _sections(rows)], left=2)


def _line(section: Sequence[Row], methods: Sequence[str]) -> list[str]:
    rival, ours = best_rival(section, "psnr"), next(row for row in section if row.role == "ours")
    cells = [ours.model, f"{ours.asked_steps} of {ours.num_inference_steps}", f"{1 / ours.compute_fraction:.2f}x"]
    first, *others = (metric_text(_ours(section, method), "psnr") for method in methods)
    beside = [rival.method, metric_text(rival, "psnr")] if rival else ["none", ""]
    return [*cells, f"**{first}**", *others, *beside]


def _predictions(results: Sequence[Sequence[Row]], metas: Sequence[Mapping[str, Any]]) -> str:
    """How far the predicted PSNR lay from the measured one; empty where no comparison kept it."""
    errors = []
    for rows, meta in zip(results, metas, strict=True):
        for section in _sections(rows):
            for ours in (row for row in section if row.role == "ours" and row.psnr is not None):
                known = meta.get("predicted") or {}
                predicted = known.get(f"{ours.method} {ours.asked_steps}", known.get(str(ours.asked_steps)))
                if predicted is not None:
                    errors.append(predicted - ours.psnr)
    if not errors:
        return ""
    low, high = (METRICS["psnr"].show(error, sign=True) for error in (min(errors), max(errors)))
    return f"Predicted minus measured PSNR, over the {len(errors)} rows that kept a prediction: {low} to {high} dB."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 1 for a failure or a README that differs, 2 for a wrong flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.overview", description="Fill the generated parts of the README.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, metavar="README.md", required=True, help="file with the markers")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the file would change")
    options = parser.parse_args(arguments)
    results, metas = zip(*map(read_results, options.results), strict=True)
    fill(options.into, overview_markdown(results, metas), MARKER, options.check)
    fill(options.into, strip_markdown(results[0]), STRIP_MARKER, options.check)


if __name__ == "__main__":
    sys.exit(main())
