"""Fill the method page's table: what each part brings, at every measured cost.

python -m compare.ablation_table RESULTS.json --into method.md           put it between the markers
python -m compare.ablation_table RESULTS.json --into method.md --check   exit code 1 when the page says something else
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from compare.pages import ResultsError, fill, grid
from compare.results import METRICS, Row, metric_text, read_results
from ertacache.cli import command

MARKER = "ablation"
SHOWN = ("psnr", "lpips")


def ablation_markdown(rows: Sequence[Row]) -> str:
    """One line per variant, ours last; one column per metric and number of computed steps.

    Raises:
        ResultsError: the rows are of several models, or hold no ablation.
    """
    parts = [row for row in rows if row.role == "ablation"]
    ours = [row for row in rows if row.role == "ours"]
    if len({row.model for row in parts + ours}) != 1 or not parts:
        raise ResultsError("expected the ablation of one model")
    cells = {(row.method, row.asked_steps): row for row in parts + ours}
    asked = sorted({row.asked_steps for row in parts if row.asked_steps}, reverse=True)
    columns = [(name, steps) for name in SHOWN for steps in asked]
    lines = [
        [variant, *(metric_text(cells.get((variant, steps)), name) for name, steps in columns)]
        for variant in dict.fromkeys(row.method for row in parts + ours)
    ]
    if ours:
        lines[-1] = [f"**{cell}**" for cell in lines[-1]]
    header = ["Variant", *(f"{METRICS[name].label} at {steps}" for name, steps in columns)]
    counts = f"{', '.join(map(str, asked))} of {parts[0].num_inference_steps} steps computed"
    return (
        f"{parts[0].model} on {parts[0].device}, {parts[0].n} pairs of held-out prompt and seed; PSNR in dB and LPIPS "
        f"to the uncached result, at {counts}:\n\n{grid(header, lines)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 1 for a failure or a page that differs, 2 for a wrong flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.ablation_table", description="Fill the method page's table.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, metavar="method.md", required=True, help="file with the two markers")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the file would change")
    options = parser.parse_args(arguments)
    fill(options.into, ablation_markdown(read_results(options.results)[0]), MARKER, options.check)


if __name__ == "__main__":
    sys.exit(main())
