"""EasyCache (Zhou et al., 2025, arXiv 2507.02860), own implementation: output-level reuse without calibration.

d = v - x is the residual of the whole transformer, k = |v - v'| / |x - x'| its rate of change between the last
two computed steps. A reused step returns x + d. Steps are reused while the predicted relative change
E = sum of k |x_t - x_{t-1}| / |v_{t-1}| stays below the threshold; |.| is the mean absolute value, over both guidance
branches where one call holds both. Channels that a model puts out beside v (variances) keep their last values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from compare.rivals.base import Clock, NotApplicable, Rival, Setting, first_input, geometric, watch

HOOK_NAME = "ertacache_rival_easycache"
WARM_UP = 0.2  # fraction of the steps: the authors' 10 of 50


@dataclass
class _Branch:
    """State of one guidance branch."""

    residual: Tensor | None = None  # v - x of the last computed step; None before the first
    full_input: Tensor = field(default_factory=lambda: torch.empty(0))  # x and v of the last computed step
    full_output: Tensor = field(default_factory=lambda: torch.empty(0))
    rate: float | None = None  # k
    last_input: Tensor = field(default_factory=lambda: torch.empty(0))  # x and v of the last step, computed or not
    last_output: Tensor = field(default_factory=lambda: torch.empty(0))
    beside: Tensor = field(default_factory=lambda: torch.empty(0))  # channels beside v of the last computed step
    structure: Any = tuple  # type of the transformer's output


class _RootHook(ModelHook):
    """Around the whole transformer."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold
        self.clock = Clock()
        self.reset()

    def reset(self) -> None:
        self.branches: dict[str, _Branch] = {}
        self.accumulated = 0.0
        self.decision: tuple[int, bool] = (-1, True)  # step, and whether it is computed

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = first_input(module, args, kwargs)
        branch = self.branches.setdefault(self.clock.branch, _Branch())
        if self.decision[0] != self.clock.step:  # the conditional branch comes first and decides for both
            self.decision = (self.clock.step, self._should_compute(branch, hidden))
        if self.decision[1] or branch.residual is None:
            output = self._compute(branch, hidden, args, kwargs)
        else:
            output = (hidden + branch.residual).to(branch.last_output.dtype)
        branch.last_input, branch.last_output = hidden, output
        return self._packed(branch, output)

    def _should_compute(self, branch: _Branch, hidden: Tensor) -> bool:
        warm_up = max(1, round(WARM_UP * self.clock.num_steps))
        if self.clock.step < warm_up or self.clock.step >= self.clock.num_steps - 1 or branch.rate is None:
            return True
        change = _size(hidden - branch.last_input)
        self.accumulated += branch.rate * change / max(_size(branch.last_output), 1e-12)
        if self.accumulated < self.threshold:
            return False
        self.accumulated = 0.0
        return True

    def _compute(self, branch: _Branch, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        result = self.fn_ref.original_forward(*args, **kwargs)
        branch.structure = type(result)
        whole = result if isinstance(result, Tensor) else result[0]
        output, branch.beside = whole[:, : hidden.shape[1]], whole[:, hidden.shape[1] :]
        if output.shape != hidden.shape:
            raise NotApplicable(
                f"EasyCache reuses output - input, and {tuple(whole.shape)} is not the shape of "
                f"the input {tuple(hidden.shape)}"
            )
        if branch.residual is not None:
            change = _size(hidden - branch.full_input)
            branch.rate = _size(output - branch.full_output) / max(change, 1e-12)
        branch.residual, branch.full_input, branch.full_output = output - hidden, hidden, output
        return output

    @staticmethod
    def _packed(branch: _Branch, output: Tensor) -> Any:
        """The output as the transformer returns it."""
        if branch.beside.shape[1]:
            output = torch.cat([output, branch.beside], dim=1)
        if issubclass(branch.structure, Tensor):
            return output
        return (output,) if branch.structure is tuple else branch.structure(sample=output)


def _size(values: Tensor) -> float:
    """Mean absolute value."""
    return values.abs().mean().item()


class EasyCache(Rival):
    """Reuse of the whole transformer's residual; `threshold` bounds the predicted relative change of the output."""

    name = "easycache"
    knob = "threshold"

    def settings(self, num_steps: int) -> list[Setting]:
        return [{"threshold": value} for value in geometric(20.0, 0.002)]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        hook = _RootHook(float(setting["threshold"]))
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.register_hook(hook, HOOK_NAME)
        try:
            with watch(pipe, hook.reset) as hook.clock:
                yield {}
        finally:
            registry.remove_hook(HOOK_NAME, recurse=False)
