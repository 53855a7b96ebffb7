"""Puts the measured tables into docs/speed.md, and draws their figures.

    python bench/speed_page.py           write tables and figures from bench/results/*.json
    python bench/speed_page.py --check   change nothing, exit code 1 when the page says something else

A section whose JSON is not there says which command makes it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_page
from page_parts import Record, machines, size_of
from record import RESULTS, ROOT, read
from speed_targets import commands, targets

from compare.pages import grid, replace_between

PAGE = ROOT / "docs" / "speed.md"


def latency(records: Sequence[Record]) -> str:
    header = ["Model and size", "Steps", "Uncached, s", "Cached, s", "Speed-up", "Ideal", "Realised / ideal"]
    header += ["Reused step, % of a computed one"]
    lines = [
        [
            f"{record['model']}, {size_of(record)}",
            f"{len(row['computed_steps'])} of {row['num_inference_steps']}",
            f"{row['uncached_seconds']:.3g}",
            f"{row['cached_seconds']:.3g}",
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['realised_over_ideal']:.3f}",
            f"{row['reused_percent_of_computed']:.3g}",
        ]
        for record in records
        for row in record["rows"]
    ]
    return f"{grid(header, lines)}\n\n{machines(records)}"


def shares(records: Sequence[Record]) -> str:
    header = ["Model and size", "Transformer, %", "Scheduler, %", "Rest of the pipeline, %"]
    header += ["Reused step: scheduler and cache, ms", "Reused step: rest of the pipeline, ms"]
    lines = []
    for record in records:
        row = record["rows"][0]
        percents = [f"{row[f'{part}_percent']:.3g}" for part in ("transformer", "scheduler", "pipeline")]
        times = [row["reused_scheduler_and_cache_seconds"], row["reused_pipeline_seconds"]]
        lines.append([f"{record['model']}, {size_of(record)}", *percents, *(f"{1000 * t:.3g}" for t in times)])
    return grid(header, lines)


def memory(records: Sequence[Record]) -> str:
    header = [
        "Model and size",
        "Cache",
        "MiB beyond uncached",
        "the same in guided outputs",
        "Peak, MiB beyond",
    ]
    lines = []
    for record in records:
        for entry in record.get("memory", []):
            if entry["method"] == "none":
                continue
            name = f"{record['model']}, {size_of(record)}"
            if "beyond_uncached_bytes" not in entry:
                lines.append([name, entry["method"], entry.get("error", "not applicable"), "–", "–"])
                continue
            beyond, peak = (
                f"{entry[key] / 2**20:.3g}" for key in ("beyond_uncached_bytes", "peak_beyond_uncached_bytes")
            )
            lines.append([name, entry["method"], beyond, f"{entry['beyond_uncached_outputs']:.2f}", peak])
    return grid(header, lines, left=2) if lines else ""


def prompts(records: Sequence[Record]) -> str:
    header = ["Model", "Steps", "Prompts", "PSNR, dB (lowest, highest draw)", "p10, dB", "Predicted, dB"]
    header += ["Evaluations", "Seconds"]
    lines = [
        [
            record["model"],
            f"{row['computed_steps']} of {row['num_inference_steps']}",
            str(row["prompts"]),
            f"{row['psnr']:.2f} ({row['psnr_lowest']:.2f}, {row['psnr_highest']:.2f})",
            f"{row['psnr_p10']:.2f}",
            "–" if row["predicted_psnr"] is None else f"{row['predicted_psnr']:.2f}",
            str(row["evaluations"]),
            f"{row['calibration_seconds']:.3g}",
        ]
        for record in records
        for row in record["rows"]
    ]
    figure = "![held-out PSNR over calibration prompts](speed-prompts.png)"
    held = ", ".join(f"{record['model']} {record['held_out_prompts']}" for record in records)
    return f"{grid(header, lines, left=2)}\n\nHeld-out prompts: {held}.\n\n{machines(records)}\n\n{figure}"


def scaling(records: Sequence[Record]) -> str:
    record = records[0]
    header = ["Grows", "from .. to", "recording", "Gram matrix", "policy", "fitting", "policy at the largest, s"]
    lines = [
        [
            one["varied"],
            f"{one['numbers'][0]} .. {one['numbers'][-1]}",
            *(f"{one['growth'][stage]:.2f}" for stage in ("record", "gram", "policy", "fit")),
            f"{one['seconds']['policy'][-1]:.3g}",
        ]
        for one in record["series"]
    ]
    figure = "![seconds of each stage over what grows](speed-scaling.png)"
    return f"Exponents of growth.\n\n{grid(header, lines, left=2)}\n\n{machines(records)}\n\n{figure}"


def few_steps(records: Sequence[Record]) -> str:
    header = ["Model", "N", "K", "Speed-up", "Ideal", "Realised / ideal"]
    header += ["ERTACache, dB (p10)", "K plain steps, dB (p10)"]
    lines = [
        [
            record["model"],
            str(row["num_inference_steps"]),
            str(len(row["computed_steps"])),
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['realised_over_ideal']:.3f}",
            f"{row['psnr']:.1f} ({row['psnr_p10']:.1f})",
            f"{row['fewer_steps_psnr']:.1f} ({row['fewer_steps_psnr_p10']:.1f})",
        ]
        for record in records
        for row in record["rows"]
    ]
    figure = "![PSNR over speed-up at few steps](speed-few-steps.png)"
    return f"{grid(header, lines)}\n\n{machines(records)}\n\n{figure}"


# section of the page -> (what makes it, patterns of JSON files, command that makes those)
SECTIONS: dict[str, tuple[Callable[[Sequence[Record]], str], str, str]] = {
    "targets": (targets, "latency_* gpu/*", "python bench/latency.py"),
    "latency": (latency, "latency_*", "python bench/latency.py"),
    "shares": (shares, "latency_*", "python bench/latency.py"),
    "memory": (memory, "latency_*", "python bench/latency.py --memory"),
    "gpu": (gpu_page.latency, "gpu/*", "sh bench/gpu.sh"),
    "gpu-checks": (gpu_page.checks, "gpu/*", "sh bench/gpu.sh"),
    "gpu-rivals": (gpu_page.rivals, "gpu/rivals", "sh bench/gpu.sh rivals"),
    "gpu-offload": (gpu_page.offload, "gpu/offload", "sh bench/gpu.sh offload"),
    "prompts": (prompts, "prompts_needed_*", "python bench/prompts_needed.py"),
    "scaling": (scaling, "scaling", "python bench/scaling.py"),
    "few-steps": (few_steps, "few_steps_*", "python bench/few_steps.py"),
}


def section(name: str, folder: Path = RESULTS) -> str:
    """The Markdown of a section, from whatever results there are."""
    make, patterns, command = SECTIONS[name]
    records = [record for pattern in patterns.split() for record in read(pattern, folder)]
    return (make(records) if records else "") or f"Not measured yet: `{command}`."


def filled(text: str, folder: Path = RESULTS) -> str:
    """The page with every section between its markers; ValueError where a marker is missing."""
    for name in SECTIONS:
        text = replace_between(text, section(name, folder), name)
    return replace_between(text, commands(folder), "commands")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something would change")
    options = parser.parse_args(argv)
    from speed_plots import FIGURES, draw, is_current

    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    stale = [name for name in FIGURES if not is_current(name)]
    if options.check:
        if before != after or stale:
            names = ", ".join(stale) or PAGE.name
            print(f"speed_page: {names} differs from bench/results: run python bench/speed_page.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(after, encoding="utf-8")
    for name in stale:
        draw(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
