"""The parts of bench/gpu.sh: what each of them measures of the real architectures with random weights.

A part writes <folder>/<part>.json after every measurement, so that whatever ends it leaves what it has. On a CPU the
same code runs on models cut down to a block or two of one attention head.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import gpu_caches
import torch
from device_checks import all_computed, graph_replay, host_syncs
from real_architecture import Request
from real_models import MODELS
from record import attempted, failure, machine, write
from step_timer import Call, Timings, compare, time_run
from subjects import Subject, caller, real_subject
from synthetic import grid_and_shape

import ertacache
from compare.rivals.base import NotApplicable
from ertacache.calibration import Calibration

FEW = 6  # steps where a step's cost is all that is asked for; half of them computed
CHECKED = 4  # steps of a run that is looked at, not timed
SHORTEST = 2  # the same of models whose steps take seconds
OFFLOADED = 0.25  # of FLUX's blocks: the host's copy of all of them takes long to make
TOLERANCE = 1e-2  # of a graph's result in half precision, relative
SMALLEST = Request(0.02, 0.07, 17, width=0.01)  # for a CPU


@dataclass
class Session:
    """One part's run.

    Attributes:
        name: of the part, and of its file.
        until: what time.monotonic() says when the part is ended; no round begins that would last longer.
        say: told each result in a line.
        failures: what could not be measured; the rest of the part goes on.
    """

    name: str
    folder: Path
    until: float
    dry: bool
    say: Callable[[str], None]
    record: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def subject(self, name: str, dtype: torch.dtype | None = None, layers: float = 1.0) -> Subject:
        """A real architecture on the device, of which the record speaks from now on."""
        dtype = torch.float32 if self.dry else dtype or MODELS[name].dtype
        cut = SMALLEST if self.dry else Request(layers)
        frames = cut.frames if "num_frames" in MODELS[name].size else None
        subject = real_subject(
            name, dataclasses.replace(cut, frames=frames, device=self.device, dtype=dtype), None, None
        )
        self.record |= {
            "part": self.name,
            **subject.record,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            **machine(self.device, dtype),
        }
        return subject

    def converted(self, subject: Subject, dtype: torch.dtype | None) -> Subject:
        """The subject in another dtype, if one is given; its transformer is changed in place."""
        if dtype is None:
            return subject
        dtype = torch.float64 if self.dry else dtype  # halves are slow on a CPU
        subject.pipe.transformer.to(dtype)
        arguments = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in subject.arguments.items()
        }
        return dataclasses.replace(subject, arguments=arguments, dtype=dtype)

    def save(self) -> None:
        write(self.name, self.record, self.folder)

    def add(self, key: str, work: Callable[[], Any], into: dict[str, Any] | None = None) -> None:
        """Put what `work` returns, a dictionary, into the record, or how it failed."""
        found = attempted(work)
        (self.record if into is None else into)[key] = found
        if "error" in found:
            self.failures.append(f"{key}: {found['error']}")
        self.say(f"{key}: {found}")
        self.save()

    def call(self, subject: Subject, steps: int) -> Call:
        return caller(subject.pipe, subject.arguments, steps, self.device.type)

    def rows(self, subject: Subject, steps: int, counts: Sequence[int], variant: str, rounds: int) -> None:
        """One row a number of computed steps; uncached and cached runs in turns, the rows saved after each round."""
        found = attempted(partial(self._rows, subject, steps, counts, variant, rounds))
        if found is not None:
            self.failures.append(f"{variant}: {found['error']}")
            self.say(self.failures[-1])

    def _rows(self, subject: Subject, steps: int, counts: Sequence[int], variant: str, rounds: int) -> None:
        call, pipe = self.call(subject, steps), subject.pipe
        calibrations = [subject.calibration(call, steps, count) for count in counts]
        output_bytes = grid_and_shape(pipe, call)[3]
        attachings = [nullcontext, *(partial(ertacache.apply, pipe, made) for made in calibrations)]
        runs: list[list[Timings]] = [[] for _ in attachings]
        peaks = [0] * len(attachings)
        before = self.record.setdefault("rows", [])[:]
        short = self.call(subject, SHORTEST)  # the first runs load libraries and take memory
        short()
        with ertacache.apply(pipe, subject.calibration(short, SHORTEST, 1)):
            short()
        for _ in range(1 if self.dry else rounds):
            began = time.monotonic()
            for index, attach in enumerate(attachings):
                self.forget_peak()
                with attach():
                    runs[index].append(time_run(pipe, call, self.device, split=False))
                peaks[index] = self.peak()
            self.record["rows"] = before + [
                {
                    **compare(runs[0], runs[index], made.computed_steps),
                    "variant": variant,
                    "uncached_peak_bytes": peaks[0],
                    "extra_latents": (peaks[index] - peaks[0]) / output_bytes,
                }
                for index, made in enumerate(calibrations, 1)
            ]
            self.save()
            if 2 * time.monotonic() - began > self.until:
                break
        for row in self.record["rows"][len(before) :]:
            self.say(row_line(self.record["model"], row))

    def forget_peak(self) -> None:
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes on the device since `forget_peak`; 0 on a CPU."""
        return 0 if self.dry else torch.cuda.max_memory_allocated()

    def checks(self, subject: Subject, steps: int, graph: bool = False) -> None:
        """Equality with every step computed, synchronisation, and a graph's replay, in runs of so many steps."""
        pipe, call = subject.pipe, self.call(subject, steps)
        name = dtype_name(subject)
        half = subject.calibration(call, steps, steps // 2)
        everything = plain(subject.calibration(call, steps, steps))
        self.add(f"all_computed_{name}", lambda: all_computed(pipe, call, everything))
        self.add(f"host_syncs_{name}", lambda: host_syncs(pipe, call, half))
        if graph:
            self.add(f"graph_replay_{name}", lambda: graph_replay(pipe, call, half, TOLERANCE))


def plain(calibration: Calibration) -> Calibration:
    """The calibration with every output used as it is."""
    return dataclasses.replace(calibration, coefficients=[[1.0]] * calibration.num_inference_steps)


def row_line(model: str, row: dict[str, Any]) -> str:
    """A row of timings in a line."""
    return (
        f"{model}, {row['variant']}: {len(row['computed_steps'])} of {row['num_inference_steps']} steps, "
        f"{row['uncached_seconds']:.3g} s -> {row['cached_seconds']:.3g} s, "
        f"realised over ideal {row['realised_over_ideal']:.3f}, "
        f"a reused step {row['reused_percent_of_computed']:.3g} %"
    )


def dtype_name(subject: Subject) -> str:
    return str(subject.dtype).removeprefix("torch.")


# -- parts -------------------------------------------------------------------------------------------------


def flux(session: Session) -> None:
    """FLUX.1-dev whole: its 28 steps, checks, then both once more in float16."""
    subject, (steps, *counts) = session.subject("flux"), session_counts(session)
    session.rows(subject, steps, counts, f"eager, {dtype_name(subject)}", rounds=3)
    session.checks(subject, CHECKED, graph=True)
    other = session.converted(subject, torch.float16)
    session.rows(other, steps, counts[:1], f"eager, {dtype_name(other)}", rounds=1)
    session.checks(other, CHECKED)


def session_counts(session: Session) -> tuple[int, ...]:
    """FLUX's steps, and the computed ones of each row."""
    return (4, 2) if session.dry else (28, 14, 9)


def few_steps(session: Session, name: str, dtypes: Sequence[torch.dtype | None] = (None,)) -> None:
    """A few steps of a video model, since each costs the same."""
    subject = session.subject(name)
    for dtype in dtypes:
        subject = session.converted(subject, dtype)
        session.rows(subject, FEW, [FEW // 2], f"eager, {dtype_name(subject)}", rounds=2)
        session.checks(subject, SHORTEST)


wan = partial(few_steps, name="wan")
opensora = partial(few_steps, name="opensora")
cogvideox = partial(few_steps, name="cogvideox", dtypes=(None, torch.bfloat16))


def compiled(session: Session) -> None:
    """FLUX.1-dev with its blocks compiled, then the transformer whole; counts graphs without the cache and with it."""
    subject, (steps, *counts) = session.subject("flux"), session_counts(session)
    transformer, options = subject.pipe.transformer, {"fullgraph": True}
    if session.dry:
        options["backend"] = "eager"  # inductor would compile for minutes
    ways = {
        "blocks": partial(transformer.compile_repeated_blocks, **options),
        "whole": partial(transformer.compile, **options),
    }
    for name, compiling in ways.items():
        session.add(f"compile_{name}", partial(_compile_and_time, session, subject, name, compiling, steps, counts))
        for module in transformer.modules():
            module._compiled_call_impl = None
        torch.compiler.reset()


def _compile_and_time(
    session: Session, subject: Subject, name: str, compiling: Callable[[], None], steps: int, counts: Sequence[int]
) -> dict[str, Any]:
    before, began = _graphs(), time.monotonic()
    compiling()
    session.call(subject, 2)()
    seconds, uncached = time.monotonic() - began, _graphs()
    session.rows(subject, steps, counts, f"compiled, {name}", rounds=2)
    return {"seconds": round(seconds, 1), "graphs": uncached - before, "more_with_the_cache": _graphs() - uncached}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def rivals(session: Session) -> None:
    """Other caches on FLUX.1-dev that compute as many steps: seconds and peak memory beyond the uncached run."""
    subject, (steps, count, *_) = session.subject("flux"), session_counts(session)
    call, pipe = session.call(subject, steps), subject.pipe
    calibration = subject.calibration(call, steps, count)
    output_bytes = grid_and_shape(pipe, call)[3]
    session.record |= {"computed_steps": count, "num_inference_steps": steps, "rivals": []}
    ways = [("none", nullcontext), *gpu_caches.computing_as_many(pipe, calibration)]
    for name, attach in ways:
        entry: dict[str, Any] = {"method": name}
        session.record["rivals"].append(entry)
        session.add(name, partial(_measure_rival, session, pipe, call, attach, output_bytes, entry), {})


def _measure_rival(
    session: Session,
    pipe: Any,
    call: Call,
    attach: Callable[[], AbstractContextManager[Any]],
    output_bytes: int,
    entry: dict[str, Any],
) -> dict[str, Any]:
    """Fill a cache's entry, and return it."""
    first = session.record["rivals"][0]
    try:
        session.forget_peak()
        with attach(), gpu_caches.computed_steps(pipe) as made:
            call()
        entry |= {"computed_steps": made[0], "peak_bytes": session.peak()}
        entry["extra_bytes"] = entry["peak_bytes"] - first["peak_bytes"]
        entry["extra_latents"] = entry["extra_bytes"] / output_bytes
        with attach():  # the first run loaded what the cache needs
            entry["seconds"] = time_run(pipe, call, session.device, split=False).loop
    except NotApplicable as reason:
        entry["not_applicable"] = str(reason)
    except Exception as problem:
        entry |= failure(problem)
    return entry


def offload(session: Session) -> None:
    """A quarter of FLUX.1-dev's blocks with the weights on the host: bytes that come to the device, a step each."""
    subject = session.subject("flux", layers=OFFLOADED)
    call = session.call(subject, CHECKED)
    calibration = subject.calibration(call, CHECKED, CHECKED // 2)
    session.record |= {"rows": [], "offload": {}}
    for kind in ("model", "sequential"):
        moved = partial(gpu_caches.weights_moved, subject.pipe, call, calibration, kind, session.device)
        session.add(kind, moved, session.record["offload"])


def run(name: str, folder: Path, until: float, dry: bool, say: Callable[[str], None]) -> None:
    """Measure one part. Raises SystemExit where no part can run."""
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: sh bench/gpu.sh --dry runs everything cut down on a CPU")
    part: Callable[[Session], None] = globals()[name]
    session = Session(name, folder, until, dry, say)
    part(session)
    if session.failures:
        raise RuntimeError("; ".join(session.failures))
