"""TeaCache (Liu et al., 2024, arXiv 2411.19108), own implementation on any stack of blocks.

The timestep-modulated input of the first block tells how much the output will change. Its relative L1 distance between
successive steps, rescaled by a polynomial of degree 4 fitted on calibration prompts, is summed; below the threshold
the stack's residual h_out - h_in of the last computed step is added again. The first and the last step are computed.
Each guidance branch has its own state.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compare.rivals.base import Clock, NotApplicable, Rival, Run, Setting, geometric, watch
from compare.rivals.stack import intercepted

POLYNOMIAL_DEGREE = 4

# (transformer, arguments of its forward by name) -> the modulated input of its first block (n, tokens, channels)
ModulatedInput = Callable[[nn.Module, dict[str, Any]], Tensor]


def relative_distance(now: Tensor, before: Tensor) -> float:
    """Relative L1 distance, mean |now - before| / mean |before|; 0 where nothing changed from nothing."""
    change, size = (now - before).abs().mean().item(), before.abs().mean().item()
    return change / size if size > 0 else float(change > 0)


@dataclass
class _Branch:
    """State of one guidance branch."""

    signal: Tensor = field(default_factory=lambda: torch.empty(0))  # modulated input of the last step
    residual: Tensor | None = None  # h_out - h_in of the last computed step
    accumulated: float = 0.0


class _Recorder:
    """Record pairs (distance of inputs, distance of outputs) of successive steps of an uncached run."""

    def __init__(self, transformer: nn.Module, modulated_input: ModulatedInput):
        self.transformer, self.modulated_input = transformer, modulated_input
        self.clock = Clock()
        self.last: dict[str, tuple[Tensor, Tensor]] = {}
        self.pairs: list[tuple[float, float]] = []
        self.signal = torch.empty(0)  # of the present step

    def enter(self, arguments: dict[str, Any]) -> None:
        self.signal = self.modulated_input(self.transformer, self.clock.arguments)

    def leave(self, hidden_in: Tensor, hidden_out: Tensor) -> None:
        if self.clock.branch in self.last:
            signal, output = self.last[self.clock.branch]
            self.pairs.append((relative_distance(self.signal, signal), relative_distance(hidden_out, output)))
        self.last[self.clock.branch] = (self.signal, hidden_out)


class _Gate:
    """Reuse while the accumulated distance stays below the threshold."""

    def __init__(
        self, transformer: nn.Module, modulated_input: ModulatedInput, coefficients: list[float], threshold: float
    ):
        self.transformer, self.modulated_input = transformer, modulated_input
        self.coefficients, self.threshold = coefficients, threshold
        self.clock = Clock()
        self.branches: dict[str, _Branch] = {}

    def enter(self, arguments: dict[str, Any]) -> Tensor | None:
        branch = self.branches.setdefault(self.clock.branch, _Branch())
        signal = self.modulated_input(self.transformer, self.clock.arguments)
        at_end = self.clock.step >= self.clock.num_steps - 1
        compute = branch.residual is None or at_end
        if not compute:
            distance = float(np.polyval(self.coefficients, relative_distance(signal, branch.signal)))
            # Outside the fitted range the polynomial can be negative; a distance is not.
            branch.accumulated += max(distance, 0.0)
            compute = branch.accumulated >= self.threshold
        branch.signal = signal
        if compute:
            branch.accumulated = 0.0
            return None
        return arguments["hidden_states"] + branch.residual

    def leave(self, hidden_in: Tensor, hidden_out: Tensor) -> None:
        self.branches[self.clock.branch].residual = hidden_out - hidden_in


class TeaCache(Rival):
    """`modulated_input` is the model's signal, in its folder's transformer.py; `coefficients`, highest power first,
    are fitted by `prepare`."""

    name = "teacache"
    knob = "threshold"

    def __init__(self, modulated_input: ModulatedInput | None = None, coefficients: list[float] | None = None):
        self.modulated_input = modulated_input
        self.coefficients, self.recorded = coefficients, 0.0

    def prepare(self, pipe: Any, runs: Sequence[Run], num_steps: int) -> None:
        """Fit by least squares, pooling all steps of all prompts and branches, as the authors do."""
        if self.modulated_input is None:
            raise NotApplicable("TeaCache needs the model's own signal: a function modulated_input")
        self.recorded = float(len(runs))
        recorder = _Recorder(pipe.transformer, self.modulated_input)
        with watch(pipe, recorder.last.clear) as recorder.clock, intercepted(pipe.transformer, recorder):
            for run in runs:
                run()
        if len(recorder.pairs) <= POLYNOMIAL_DEGREE:
            raise NotApplicable(f"{len(recorder.pairs)} pairs of steps are too few to fit TeaCache's polynomial")
        inputs, outputs = np.array(recorder.pairs).T
        self.coefficients = [float(c) for c in np.polyfit(inputs, outputs, POLYNOMIAL_DEGREE)]

    def spent(self, setting: Setting) -> float | None:
        return self.recorded

    def settings(self, num_steps: int) -> list[Setting]:
        return [{"threshold": value} for value in geometric(10.0, 0.005)]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        if self.modulated_input is None or self.coefficients is None:
            raise NotApplicable("TeaCache has no signal or no polynomial yet: call prepare")
        gate = _Gate(pipe.transformer, self.modulated_input, self.coefficients, float(setting["threshold"]))
        with watch(pipe, gate.branches.clear) as gate.clock, intercepted(pipe.transformer, gate):
            yield {}
