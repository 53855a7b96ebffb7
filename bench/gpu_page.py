"""Tables of docs/speed.md from what bench/gpu.sh wrote, whatever there is of it."""

from collections.abc import Sequence

from page_parts import Record, machines, size_of

from compare.pages import grid

MIB = 2**20


def latency(records: Sequence[Record]) -> str:
    """Rows of timings, and how the run of all parts went."""
    timed = [record for record in records if record.get("rows")]
    header = ["Model and size", "How", "Steps", "Uncached, s", "Cached, s", "Realised / ideal"]
    header += ["Reused step, % of a computed one", "Peak, GiB", "the cache's, latents"]
    lines = [
        [
            f"{record['model']}, {size_of(record)}",
            row["variant"],
            f"{len(row['computed_steps'])} of {row['num_inference_steps']}",
            f"{row['uncached_seconds']:.3g}",
            f"{row['cached_seconds']:.3g}",
            f"{row['realised_over_ideal']:.3f}",
            f"{row['reused_percent_of_computed']:.3g}",
            f"{row['uncached_peak_bytes'] / 2**30:.1f}",
            f"{row['extra_latents']:.1f}",
        ]
        for record in timed
        for row in record["rows"]
    ]
    if not lines:
        return ""
    runs = [_run_line(record) for record in records if "parts" in record]
    return "\n\n".join([grid(header, lines, left=2), machines(timed), *runs])


def _run_line(run: Record) -> str:
    """The parts that did not end well."""
    ended = [f"{part['part']} {part['status']}" for part in run["parts"] if part["status"] != "done"]
    return f"{run['date']}: {run['seconds']:.0f} s in all" + (f"; {', '.join(ended)}." if ended else ".")


def checks(records: Sequence[Record]) -> str:
    """Equality, synchronisation, graphs and compiling, a line each."""
    lines = []
    for record in records:
        for name, found in record.items():
            if name.startswith(("all_computed", "host_syncs", "graph_replay", "compile_")):
                lines.append([record["model"], name.replace("_", " "), found_text(found)])
    return grid(["Model", "Check", "Found"], lines, left=3) if lines else ""


def found_text(found: Record) -> str:
    """What a check found, in words."""
    text = ", ".join(f"{name.replace('_', ' ')}: {_value(value)}" for name, value in found.items())
    return text.replace("|", "/")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rivals(records: Sequence[Record]) -> str:
    """Seconds and peak memory of every cache at as many computed steps."""
    (record,) = records
    lines = []
    for entry in record["rivals"]:
        problem = entry.get("error") or entry.get("not_applicable")
        numbers = ["–"] * 4
        if "seconds" in entry:
            numbers = [
                f"{entry['computed_steps']} of {record['num_inference_steps']}",
                f"{entry['seconds']:.3g}",
                f"{entry['extra_bytes'] / MIB:.3g}",
                f"{entry['extra_latents']:.1f}",
            ]
        lines.append([entry["method"] + (f" ({problem})" if problem else ""), *numbers])
    header = ["Cache", "Computed", "Seconds", "Peak beyond uncached, MiB", "the same in latents"]
    return f"{record['model']}, {size_of(record)}.\n\n{grid(header, lines)}\n\n{machines(records)}"


def offload(records: Sequence[Record]) -> str:
    """What comes to the device at computed and reused steps."""
    (record,) = records
    header = ["Offloading", "Step", "Weights fetched, MiB", "Seconds"]
    lines = []
    for kind, found in record["offload"].items():
        if "error" in found:
            lines.append([kind, found["error"], "–", "–"])
            continue
        for step, (moved, seconds) in enumerate(zip(found["bytes"], found["seconds"], strict=True)):
            word = "computed" if step in found["computed_steps"] else "reused"
            lines.append([kind, f"{step}, {word}", f"{moved / MIB:.0f}", f"{seconds:.3g}"])
    return f"{record['model']}, {size_of(record)}.\n\n{grid(header, lines, left=2)}\n\n{machines(records)}"
