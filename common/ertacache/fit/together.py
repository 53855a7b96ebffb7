"""Fit to runs of several calls, each made on its own, as if they had been one batch.

A step is fitted to all runs at once, but only one call can be under way. So every step takes one pass over the calls:
each is made again up to that step, with the coefficients found so far and with the outputs that the transformer gave
in the passes before, and is stopped there. The transformer runs once for each computed step, as in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ertacache.cache import Cache, Coefficients
from ertacache.errors import CalibrationError
from ertacache.fit.least_squares import solve_products
from ertacache.fit.record import Array, Record
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import Runs
from ertacache.fit.step_by_step import StepFit
from ertacache.fit.store import TrajectoryStore

REPEATS_TO = 0.05  # relative difference to what was recorded: kernels of a device may round otherwise each time


class _Reached(BaseException):
    """A call has come to the step that is fitted; no error, and not for a pipeline to catch."""

    def __init__(self, step: int, products: Array):
        self.step, self.products = step, products


@dataclass
class Together:
    """Several calls of one pipeline; what the fit reads of `Runs`.

    Attributes:
        parts: one for each call.
        bar: their progress bar.
        solved: what plays the last fit in each part, with all outputs given.
    """

    parts: Sequence[Runs]
    bar: Any
    solved: list[Rerun] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def pipe(self) -> Any:
        return self.parts[0].pipe

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments that all calls have in common."""
        first, *rest = [part.kwargs for part in self.parts]
        return {k: v for k, v in first.items() if all(k in other and _same(other[k], v) for other in rest)}

    @property
    def prompts(self) -> list[str]:
        return [prompt for part in self.parts for prompt in part.prompts]

    @property
    def seeds(self) -> list[int]:
        return [seed for part in self.parts for seed in part.seeds]

    @property
    def record(self) -> Record:
        """Of the first call: grid and gains are the same in all."""
        return self.parts[0].record

    def gram(self) -> Array:
        """The Gram matrix of all outputs."""
        sizes = [part.record.latents[0].numel() for part in self.parts]
        return sum(size * part.gram() for size, part in zip(sizes, self.parts, strict=True)) / sum(sizes)  # type: ignore[return-value]

    def latents(self, fit: StepFit) -> None:
        """Make the runs of a fit."""
        self._solve(fit)

    def quality(self, cache: Cache) -> Tensor:
        """PSNR (P,) in dB of the decoded results under a cache to the recorded ones."""
        caches: Sequence[Cache] = [cache] * len(self.parts)
        if isinstance(cache, StepFit):
            self._solve(cache)
            caches = self.solved
        return torch.cat([part.quality(one) for part, one in zip(self.parts, caches, strict=True)])

    def _solve(self, fit: StepFit) -> None:
        """Find the coefficients of a fit, one pass for each step."""
        num_steps, rows = self.record.num_steps, fit.fitted_rows
        stores = [TrajectoryStore(part.record.memory_limit) for part in self.parts]
        for part, store in zip(self.parts, stores, strict=True):
            store.plan(len(fit.steps) * part.record.outputs[0].nbytes)
        if len(self.parts) == 1:  # one call is a batch: all steps in one pass
            [part], [store] = self.parts, stores
            one = fit.part(part.record.latents, rows=rows, store=store)
            part.latents(one)
            check_repeats(one.outputs[0], part.record.outputs[0], "another model output")
            fit.fitted_outputs = one.fitted_outputs
            self.solved = [Rerun(fit.steps, one.fitted(), one.outputs)]
            return
        known: list[list[Tensor]] = [[] for _ in self.parts]
        found = Coefficients([[1.0]], [0.0])  # of step 0
        for step in range(1, num_steps):
            products = []
            for part, store, outputs in zip(self.parts, stores, known, strict=True):
                one = fit.part(part.record.latents, given=found, first=step, solve=_stop, known=outputs, store=store)
                reached = _products(part, one, step)
                outputs += one.outputs
                if step == 1:
                    check_repeats(outputs[0], part.record.outputs[0], "another model output")
                if reached is not None:
                    products.append(reached)
            row = [1.0]
            if products:
                pooled = np.concatenate(products)
                row = solve_products(pooled if rows is None else pooled[list(rows)])
            found = Coefficients([*found.outputs, row], [*found.latents, 0.0])
        fit.fitted_outputs = found.outputs
        self.solved = [Rerun(fit.steps, found, outputs) for outputs in known]


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, (int, float, str, bool)) and one == other


def _stop(step: int, products: Array) -> NoReturn:
    raise _Reached(step, products)


def _products(part: Runs, fit: StepFit, step: int) -> Array | None:
    """The inner products at a step; None where it has no length, so that there is nothing to fit."""
    try:
        part.latents(fit)
    except _Reached as reached:
        return reached.products if reached.step == step else None
    return None


def check_repeats(tensor: Tensor, recorded: Tensor, what: str) -> None:
    """Raise CalibrationError where the same call leads to something else."""
    difference = float((tensor.float() - recorded.float()).norm()) / max(float(recorded.float().norm()), 1e-12)
    if not difference <= REPEATS_TO:
        raise CalibrationError(
            f"the same call gives {what} ({difference:.0%} away): it draws noise that cannot be repeated, or the model "
            "changed"
        )
