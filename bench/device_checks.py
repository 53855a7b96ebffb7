"""Checks of a cached run that need a device: host synchronisation, CUDA graphs, torch.compile.

Only the last one does anything on a CPU; the others say that they were not made there.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_timer import Call
from torch import Tensor

import ertacache
from ertacache import rectification, solver
from ertacache.baselines.base import replaced
from ertacache.calibration import Calibration

LIBRARY = str(Path(ertacache.__file__).parent)


def run_checks(pipe: Any, call: Call, calibration: Calibration, device: torch.device) -> dict[str, Any]:
    """Name -> what came out, for the JSON."""
    not_here = {"skipped": "no CUDA device"}
    cuda = device.type == "cuda"
    return {
        "host_syncs": host_syncs(pipe, call, calibration) if cuda else not_here,
        "cuda_graphs": cuda_graphs(pipe, call, calibration) if cuda else not_here,
        "compile": compiled_graphs(pipe, call, calibration),
    }


def host_syncs(pipe: Any, call: Call, calibration: Calibration) -> dict[str, int]:
    """Synchronising calls inside the loop, of an uncached run, a cached one, and those made by the library's code."""
    uncached = _synced_from(pipe, call)
    with ertacache.apply(pipe, calibration):
        cached = _synced_from(pipe, call)
    return {
        "uncached_loop": len(uncached),
        "cached_loop": len(cached),
        "by_the_cache": sum(place.startswith(LIBRARY) for place in cached),
    }


def _synced_from(pipe: Any, call: Call) -> list[str]:
    """Files whose code synchronised, once a time."""
    original = pipe.progress_bar

    def opening(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")  # from here on: what comes before is no part of the loop
        return original(*args, **kwargs)

    with warnings.catch_warnings(record=True) as seen, replaced(pipe, "progress_bar", opening):
        warnings.simplefilter("always")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [warning.filename for warning in seen if "synchronizing" in str(warning.message)]


def cuda_graphs(pipe: Any, call: Call, calibration: Calibration) -> dict[str, bool]:
    """Whether a computed step's forward and a reused step's arithmetic replay from a graph with the eager result."""
    seen: dict[str, Any] = {}

    def forward(original: Callable[..., Any]) -> Callable[..., Any]:
        def looking(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault("forward", (args, kwargs))
            return original(*args, **kwargs)

        return looking

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def looking(*args: Any, **kwargs: Any) -> Any:
            if len(seen.setdefault("outputs", [])) < len(calibration.coefficients[-1]):
                seen["outputs"].append(args[0].clone())
                seen["step"] = (copy.deepcopy(pipe.scheduler), args, kwargs)
            return original(*args, **kwargs)

        return looking

    with (
        replaced(pipe.transformer, "forward", forward(pipe.transformer.forward)),
        replaced(pipe.scheduler, "step", step(pipe.scheduler.step)),
    ):
        call()
    args, kwargs = seen["forward"]
    scheduler, step_args, step_kwargs = seen["step"]

    combined = calibration.combinations().at(calibration.num_inference_steps - 1, step_args[2])

    def reused() -> Tensor:
        output = rectification.combine(seen["outputs"], *combined)
        stepper = solver.bare_copy(scheduler)
        return solver.first_output(stepper.step(output, *step_args[1:], **step_kwargs))

    return {
        "computed_step": _replays(lambda: solver.first_output(pipe.transformer(*args, **kwargs))),
        "reused_step": _replays(reused),
    }


@torch.no_grad()
def _replays(work: Callable[[], Tensor]) -> bool:
    """Capture `work`, replay it, and compare with running it eagerly."""
    expected = work().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return torch.allclose(captured.float(), expected.float(), rtol=1e-3, atol=1e-3)


def compiled_graphs(pipe: Any, call: Call, calibration: Calibration) -> dict[str, int]:
    """Graphs that torch.compile(fullgraph=True) makes of the transformer, without and with the cache attached.

    Counted with a backend that runs the graphs eagerly; the same number means that the compiled path is whole.
    """
    counts = {}
    for name in ("uncached", "cached"):
        graphs: list[Any] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor], graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        pipe.transformer.compile(fullgraph=True, backend=backend)
        try:
            if name == "cached":
                with ertacache.apply(pipe, calibration):
                    call()
            else:
                call()
        finally:
            pipe.transformer._compiled_call_impl = None
            torch.compiler.reset()
        counts[name] = len(graphs)
    return counts
