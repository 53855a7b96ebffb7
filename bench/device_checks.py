"""Checks of a cached run that need a device: host synchronisation, CUDA graphs, torch.compile.

Only the last one does anything on a CPU; the others say that they were not made there.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import attempted
from step_timer import Call
from torch import Tensor

import ertacache
from compare.rivals.base import replaced
from ertacache import solver
from ertacache.cache import combine
from ertacache.calibration import Calibration
from ertacache.solver import StepCall, StepSignature

LIBRARY = str(Path(ertacache.__file__).parent)


def run_checks(pipe: Any, call: Call, calibration: Calibration, device: torch.device) -> dict[str, Any]:
    """Name -> what came out, for the JSON; {"error": ...} for a check that could not be made."""
    not_here = {"skipped": "no CUDA device"}
    cuda = device.type == "cuda"
    return {
        "host_syncs": attempted(lambda: host_syncs(pipe, call, calibration)) if cuda else not_here,
        "cuda_graphs": attempted(lambda: cuda_graphs(pipe, call, calibration)) if cuda else not_here,
        "compile": attempted(lambda: compiled_graphs(pipe, call, calibration)),
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


def cuda_graphs(pipe: Any, call: Call, calibration: Calibration) -> dict[str, Any]:
    """Whether a computed step's forward and the cache's sum replay from a graph with the eager result."""
    works = parts_of_steps(pipe, call, calibration)
    return {name: attempted(lambda work=work: _replays(work)) for name, work in works.items()}


def parts_of_steps(pipe: Any, call: Call, calibration: Calibration) -> dict[str, Callable[[], Tensor]]:
    """The transformer's forward at a computed step, and what the cache does at a reused one, on a run's tensors.

    Without the scheduler's step: UniPC's copies numbers from the host, which a graph cannot hold, with a cache or
    without.
    """
    forwards: list[tuple[tuple, dict[str, Any]]] = []
    steps: list[StepCall] = []
    signature = StepSignature.of(inspect.signature(pipe.scheduler.step))
    last = calibration.num_inference_steps - 1
    coefficients = calibration.combinations()

    def forward(*args: Any, **kwargs: Any) -> Any:
        forwards.append((args, kwargs))
        return original_forward(*args, **kwargs)

    def step(*args: Any, **kwargs: Any) -> Any:
        call = signature.call(args, kwargs)
        if len(steps) < len(coefficients.outputs[last]):
            steps.append(call.with_output(call.model_output.clone()))
        return original_step(*args, **kwargs)

    original_forward, original_step = pipe.transformer.forward, pipe.scheduler.step
    with (
        replaced(pipe.transformer, "forward", functools.wraps(original_forward)(forward)),
        replaced(pipe.scheduler, "step", functools.wraps(original_step)(step)),
    ):
        call()
    args, kwargs = forwards[0]
    outputs, latents = [one.model_output for one in steps], steps[-1].sample
    row = coefficients.rows(latents.device)[last]
    return {
        "computed_step": lambda: solver.first_output(pipe.transformer(*args, **kwargs)),
        "reused_step": lambda: combine(outputs, row, latents).clone(),
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
