"""The targets of docs/speed.md, met or missed by the results that there are, and what measures each of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, read

from compare.pages import grid

Record = dict[str, Any]
Found = Iterator[tuple[float, str]]  # values, and what each was measured on


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        values: of all results that it is about.
        bound: that every one of them must keep: from below where `at_least`, else from above.
    """

    text: str
    values: Callable[[Sequence[Record]], Found]
    bound: float
    at_least: bool = False

    def status(self, records: Sequence[Record]) -> str:
        """met, missed or not measured, with the worst value."""
        found = list(self.values(records))
        if not found:
            return "not measured"
        value, where = (min if self.at_least else max)(found, key=lambda one: one[0])
        met = value >= self.bound if self.at_least else value <= self.bound
        return f"{'met' if met else '**missed**'}: {value:.3g} ({where})"


def _realised(full_size: bool) -> Callable[[Sequence[Record]], Found]:
    """Realised over ideal speed-up of real sizes on a GPU, or of tiny pipelines on a CPU."""

    def values(records: Sequence[Record]) -> Found:
        for record, row in _rows(records):
            on_gpu = record["device_kind"] == "cuda"
            if (record["full_size"] and on_gpu) if full_size else (record["weights"] == "trained" and not on_gpu):
                yield row["realised_over_ideal"], _where(record, row)

    return values


def _reused(records: Sequence[Record]) -> Found:
    for record, row in _rows(records):
        if record["full_size"]:
            yield row["reused_percent_of_computed"], _where(record, row)


def _held(records: Sequence[Record]) -> Found:
    """Of each guidance branch its share: outputs are kept after guidance, one for both branches."""
    for record, row in _rows(records):
        if "extra_latents" in row and record["full_size"]:
            yield round(row["extra_latents"], 1) / record["branches"], _where(record, row)
    for record in records:
        for entry in record.get("memory", []):
            if entry["method"] == "ertacache" and "beyond_uncached_outputs" in entry:
                yield round(entry["beyond_uncached_outputs"], 1) / record["branches"], record["model"]


def _waited(records: Sequence[Record]) -> Found:
    for record in records:
        for name, found in record.items():
            if name.startswith("host_syncs") and "by_the_cache" in found:
                yield found["by_the_cache"], record["model"]


def _rows(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    return ((record, row) for record in records for row in record.get("rows", []))


def _where(record: Record, row: Record) -> str:
    return f"{record['model']}, {len(row['computed_steps'])} of {row['num_inference_steps']} steps"


TARGETS = (
    Target("realised over ideal speed-up, real size on a GPU: at least 0.98", _realised(True), 0.98, at_least=True),
    Target("realised over ideal speed-up, tiny pipelines on a CPU: at least 0.95", _realised(False), 0.95, True),
    Target("a reused step, real size: at most 0.5 % of a computed one", _reused, 0.5),
    Target("held by the cache: at most 6 tensors of the latents' size, whatever the guidance", _held, 6),
    Target("steps of the loop at which the cache waits for the device: 0", _waited, 0),
)

# command -> the results that it writes
COMMANDS = {
    "python bench/latency.py --tiny --memory": "latency_*_tiny",
    "python bench/latency.py": "latency_*_cpu_reduced",
    "sh bench/gpu.sh": "gpu/run",
    "python bench/few_steps.py": "few_steps_*",
    "python bench/prompts_needed.py": "prompts_needed_*",
    "python bench/scaling.py": "scaling",
    "python bench/changed_weights.py": "changed_weights",
    "python bench/fuzz_calibration.py": "fuzz_calibration",
    "python bench/fuzz_kill.py": "fuzz_kill",
}


def targets(records: Sequence[Record]) -> str:
    """The table of targets; each status is the worst of what was measured."""
    return grid(["Target", "Status"], [[target.text, target.status(records)] for target in TARGETS], left=2)


def commands(folder: Path = RESULTS) -> str:
    """The table of commands, with how long each took where its results say so."""
    lines = []
    for command, pattern in COMMANDS.items():
        # written one after another by one command, each with the seconds since it began
        records = [one for one in read(pattern, folder) if one.get("device_kind", "cpu") == "cpu" and "seconds" in one]
        longest = max(records, key=lambda one: one["seconds"], default=None)
        name = pattern.replace("*", "MODEL")
        took = "not measured" if longest is None else _duration(longest)
        lines.append([f"`{command}`", f"`bench/results/{name}.json`", took])
    return grid(["Command", "Writes", "Takes"], lines, left=3)


def _duration(record: Record) -> str:
    """The seconds of a result, and its threads where it says them."""
    seconds, threads = record["seconds"], record.get("threads")
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return took if threads is None else f"{took}, {threads} thread{'s' * (threads != 1)}"
