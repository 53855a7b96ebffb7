"""Put rows of a later comparison into an earlier one's results: other methods stay as they were measured.

python -m compare.merge RESULTS.json NEWER.json      replaces rows of the methods that NEWER.json has, in RESULTS.json
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare.pages import ResultsError
from compare.results import Row, read_results, write_results
from ertacache.cli import command

SAME = ("model", "num_inference_steps", "n", "prompts_sha256", "seeds", "device", "dtype")


def merged(rows: Sequence[Row], newer: Sequence[Row]) -> list[Row]:
    """The rows, with those of the newer ones' methods in place of their own; the uncached row stays.

    Seconds of the newer rows become the uncached row's over their speed-up, which is a ratio within their own run.

    Raises:
        ResultsError: they were not measured on the same model, prompts and seeds.
    """
    first = rows[0]
    for row in newer:
        other = next((name for name in SAME if getattr(row, name) != getattr(first, name)), None)
        if other:
            raise ResultsError(
                f"{row.method}: {other} is {getattr(row, other)!r:.60}, not {getattr(first, other)!r:.60}"
            )
    added = [row for row in newer if row.role != "reference"]
    kept = [row for row in rows if row.method not in {row.method for row in added}]
    reference = [row for row in kept if row.role == "reference"]
    if reference:  # another run, another load: only ratios carry over
        seconds = reference[0].denoise_seconds
        added = [replace(row, denoise_seconds=seconds / row.speedup) for row in added]
    return [*reference, *added, *(row for row in kept if row.role != "reference")]


def merged_meta(meta: dict[str, Any], newer: Sequence[Row], newer_meta: dict[str, Any]) -> dict[str, Any]:
    """What is said of the merged rows: of each method what its newest run said."""
    methods = {row.method: row.role for row in newer if row.role != "reference"}
    left_out = {
        name: why
        for name, why in {**meta.get("not applicable", {}), **newer_meta.get("not applicable", {})}.items()
        if name not in methods
    }
    both = {**meta, "predicted": {**meta.get("predicted", {}), **newer_meta.get("predicted", {})}}
    if "ours" in methods.values() and "calibration" in newer_meta:
        both["calibration"] = newer_meta["calibration"]
    both["not applicable"] = left_out
    days: dict[str, str] = {}
    for part in filter(None, meta.get("merged", "").split("; ")):
        names, day = part.rsplit(" of ", 1)
        days |= dict.fromkeys(names.split(", "), day)
    days |= dict.fromkeys(methods, newer_meta.get("date", "a later day"))
    both["merged"] = "; ".join(
        f"{', '.join(sorted(name for name in days if days[name] == day))} of {day}"
        for day in sorted(set(days.values()))
    )
    return both


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, 1 for results that do not belong together, 2 for a wrong flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.merge", description="Put rows of a later comparison into results.")
    parser.add_argument("results", type=Path)
    parser.add_argument("newer", type=Path)
    options = parser.parse_args(arguments)
    (rows, meta), (newer, newer_meta) = read_results(options.results), read_results(options.newer)
    write_results(options.results, merged(rows, newer), merged_meta(meta, newer, newer_meta))


if __name__ == "__main__":
    sys.exit(main())
