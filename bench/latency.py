"""Do saved steps become saved seconds on a CPU? Times uncached and cached denoising loops.

    python bench/latency.py flux --tiny                              the folder's tiny pipeline, the calibrations there
    python bench/latency.py wan                                      a real architecture, reduced as real_models.py says
    python bench/latency.py wan --layers 0.04 --scale 0.25 --steps 6 a thirtieth of the blocks, a sixteenth of the area
    python bench/latency.py flux --memory                            also what each cache holds

On a GPU: sh bench/gpu.sh. With OMP_NUM_THREADS=1 the times are those of the processor, which other work on the machine
leaves alone. Writes bench/results/latency_<model>_cpu_reduced.json or latency_<model>_tiny.json after every row. The
uncached and the cached runs take turns; the first of each warms up and is not counted.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from real_architecture import Request
from real_models import MODELS
from record import RESULTS, attempted, machine, write
from step_timer import Call, Timings, clock_of, compare, time_run
from subjects import Subject, caller, real_subject, tiny_subject
from synthetic import grid_and_shape

import ertacache
from ertacache.calibration import Calibration


def measure(pipe: Any, call: Call, calibration: Calibration, repeats: int, device: torch.device) -> dict[str, Any]:
    """Interleaved uncached and cached runs; see `step_timer.compare` for what comes out."""
    uncached: list[Timings] = []
    cached: list[Timings] = []
    for _ in range(repeats + 1):
        uncached.append(time_run(pipe, call, device))
        with ertacache.apply(pipe, calibration):
            cached.append(time_run(pipe, call, device))
    return compare(uncached[1:], cached[1:], calibration.computed_steps)


def measure_all(subject: Subject, options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Every row, then memory where it is asked for; saved after each, so that a crash loses little."""
    record = {
        **subject.record,
        "rows": [],
        "clock": clock_of(subject.device),
        **machine(subject.device, subject.dtype),
    }
    for steps in subject.steps:
        call = caller(subject.pipe, subject.arguments, steps)
        *_, record["latent_shape"], record["output_bytes"] = grid_and_shape(subject.pipe, call)
        for count in subject.counts(steps):
            made = subject.calibration(call, steps, count)
            record["rows"].append(measure(subject.pipe, call, made, options.repeats, subject.device))
            print(_line(record["model"], record["rows"][-1]), file=sys.stderr)
            save(record)
    if options.memory:
        from held_memory import compare_memory

        output_bytes = record["output_bytes"]
        found = attempted(lambda: compare_memory(subject.pipe, call, made, output_bytes, subject.device))
        record["memory"] = found if isinstance(found, list) else [{"method": "all", **found}]
        save(record)


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name}: {len(row['computed_steps'])} of {row['num_inference_steps']} steps, "
        f"{row['uncached_seconds']:.3g} s -> {row['cached_seconds']:.3g} s, "
        f"{row['speedup']:.2f}x of {row['ideal_speedup']:.2f}x ({row['realised_over_ideal']:.3f}), "
        f"a reused step {row['reused_percent_of_computed']:.2f} %"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--tiny", action="store_true", help="the folder's trained tiny pipeline instead")
    parser.add_argument("--layers", type=float, help="fraction of each kind of block")
    parser.add_argument("--scale", type=float, help="fraction of height and of width")
    parser.add_argument("--frames", type=int, help="frames of a video instead of the real number")
    parser.add_argument("--steps", type=int, nargs="+", help="scheduler steps instead of the real numbers")
    parser.add_argument(
        "--computed", type=int, nargs="+", help="computed steps instead of N / 1.5, N / 2, N / 3, or all kept ones"
    )
    parser.add_argument("--repeats", type=int, help="counted pairs of runs; 25 of the tiny pipelines, 3 of others")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.repeats is None:
        options.repeats = 25 if options.tiny else 3
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    if options.repeats < 1 or (options.scale is not None and options.scale <= 0):
        parser.error("--repeats must be 1 or more, --scale above 0")
    if options.layers is not None and not 0 < options.layers <= 1:
        parser.error("--layers must be above 0 and at most 1")
    return options


def _subject(name: str, options: argparse.Namespace) -> Subject | None:
    if options.tiny:
        return tiny_subject(name, options.computed)
    request = Request(options.layers, options.scale, options.frames)
    return real_subject(name, request, options.steps, options.computed)


def main(argv: list[str] | None = None) -> None:
    options = _arguments(argv)
    for name in options.models:
        subject = _subject(name, options)
        if subject is not None:
            path = f"latency_{subject.name}"
            measure_all(subject, options, lambda record, path=path: write(path, record, options.out))
        del subject  # twelve billion parameters are to go before the next ones come
        gc.collect()


if __name__ == "__main__":
    main()
