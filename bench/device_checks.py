"""Checks of a cached run on a device: bitwise equality, host synchronisation, CUDA graphs.

On a CPU they run too, so that they are known to run: nothing waits there, and a graph is a plain call.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from record import attempted
from step_timer import Call
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import ertacache
from compare.rivals.base import replaced
from ertacache.calibration import Calibration

LIBRARY = str(Path(ertacache.__file__).parent)
SYNCHRONISED = "called a synchronizing"  # of torch's warning


def all_computed(pipe: Any, call: Call, calibration: Calibration) -> dict[str, bool]:
    """Whether a calibration that computes every step gives the uncached latents bit by bit, and whether these recur."""
    expected = call()[0]
    recurs = torch.equal(call()[0], expected)
    with ertacache.apply(pipe, calibration):
        return {"equal": torch.equal(call()[0], expected), "uncached_recurs": recurs}


def host_syncs(pipe: Any, call: Call, calibration: Calibration) -> dict[str, Any]:
    """Synchronising calls inside the loop: of an uncached run, a cached one, and those made by the library's code.

    Without the look for NaN and Inf, which reads from the device after the last step. Where the uncached loop never
    waits, a cached one is run again in torch's mode that makes waiting an error.
    """
    uncached = _synced_from(pipe, call)
    with ertacache.apply(pipe, calibration, check_finite=False):
        cached = _synced_from(pipe, call)
        forbidden = "not tried: the uncached loop waits"
        if not uncached:
            error = attempted(lambda: _synced_from(pipe, call, "error"))
            forbidden = error["error"] if isinstance(error, dict) else "runs"
    return {
        "uncached_loop": len(uncached),
        "cached_loop": len(cached),
        "by_the_cache": sum(place.startswith(LIBRARY) for place in cached),
        "where_waiting_is_an_error": forbidden,
    }


def _synced_from(pipe: Any, call: Call, mode: str = "warn") -> list[str]:
    """Files whose code synchronised, once a time."""
    original = pipe.progress_bar

    def opening(*args: Any, **kwargs: Any) -> Any:
        _set_sync_mode(mode)  # from here on: what comes before is no part of the loop
        return original(*args, **kwargs)

    with warnings.catch_warnings(record=True) as seen, replaced(pipe, "progress_bar", opening):
        warnings.simplefilter("always")
        try:
            call()
        finally:
            _set_sync_mode("default")
    return [warning.filename for warning in seen if SYNCHRONISED in str(warning.message)]


def _set_sync_mode(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def graph_replay(pipe: Any, call: Call, calibration: Calibration, tolerance: float) -> dict[str, Any]:
    """A cached run whose computed steps replay one CUDA graph, which writes every output to the same memory.

    Returns:
        distance to the eager cached run, relative to its size, and whether that is at most `tolerance`.
    """
    with ertacache.apply(pipe, calibration):
        expected = call()[0].float()
        with replayed(pipe.transformer):
            found = call()[0].float()
    distance = float((found - expected).norm() / expected.norm())
    return {"equal": distance <= tolerance, "distance": distance}


@contextmanager
def replayed(transformer: nn.Module) -> Iterator[None]:
    """Answer the transformer's calls by a graph of its forward, captured at the first of them."""
    original, graphs = transformer.forward, []

    @functools.wraps(original)
    def replaying(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if not graphs:
            graphs.append(_Graph(original, leaves, spec))
        return graphs[0](leaves)

    with replaced(transformer, "forward", replaying):
        yield


class _Graph:
    """One forward on fixed memory."""

    @torch.no_grad()
    def __init__(self, forward: Callable[..., Any], leaves: list[Any], spec: Any):
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(self.inputs, spec)
        self.work = functools.partial(forward, *args, **kwargs)
        self.graph = None
        capture: Any = nullcontext()
        if torch.cuda.is_available():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is set up at the first call must not be captured
                self.work()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(self.graph)
        with capture:
            self.output = self.work()

    @torch.no_grad()
    def __call__(self, leaves: list[Any]) -> Any:
        for mine, given in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        if self.graph is not None:
            self.graph.replay()
        else:
            for mine, new in zip(tree_flatten(self.output)[0], tree_flatten(self.work())[0], strict=True):
                mine.copy_(new)
        return self.output
