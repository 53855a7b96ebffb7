"""Tune a rival's knob so its counted cost is the asked fraction of an uncached run.

Costs and errors are measured on calibration prompts, never on the held-out ones. If a rival has other parameters, each
variant is tuned and the one nearest to the uncached results wins, so no rival suffers from a choice of ours.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compare.flops import TransformerCost, compute_fraction
from compare.results import is_comparable
from compare.rivals.base import Rival, Run, Setting

ROUNDING = 1e-6


@dataclass(frozen=True)
class Measured:
    """One setting on the calibration prompts. `error`: mean squared, to the uncached results."""

    setting: Setting
    fraction: float
    error: float
    block_calls: int
    attention_calls: int


@dataclass(frozen=True)
class Tuned:
    """Outcome for one rival and one cost.

    Attributes:
        setting: what to attach.
        fraction: counted cost of `setting`, as a fraction of the uncached FLOPs, mean over prompts.
        comparable: whether `results.is_comparable` says so.
        error: mean squared distance to the uncached results, in the units of what the runs return.
    """

    setting: Setting
    fraction: float
    comparable: bool
    error: float


class Tuner:
    """Tune any number of rivals to any number of costs on one pipeline; every setting is measured once.

    Args:
        pipe: the pipeline, nothing attached.
        runs: one per calibration prompt, each running `pipe` on a fixed seed; one or two are enough.
        num_steps: steps of the uncached run.
    """

    def __init__(self, pipe: Any, runs: Sequence[Run], num_steps: int):
        self.pipe, self.runs, self.num_steps = pipe, list(runs), num_steps
        self.uncached: list[TransformerCost] = []
        self.references: list[Tensor] = []
        self._measured: dict[tuple[str, str], Measured] = {}
        self._prepared: set[str] = set()

    def prepare(self, rival: Rival, runs: Sequence[Run] | None = None) -> None:
        """Calibrate `rival` once, on `runs` if given, else on the tuning runs."""
        if rival.name not in self._prepared:
            rival.prepare(self.pipe, self.runs if runs is None else runs, self.num_steps)
            self._prepared.add(rival.name)

    def measure(self, rival: Rival, setting: Setting) -> Measured:
        """Run `rival` at `setting` on every calibration prompt.

        Raises:
            NotApplicable: the rival cannot work on this pipeline.
        """
        key = (rival.name, json.dumps(setting, sort_keys=True))
        if key not in self._measured:
            self._count_uncached()
            costs, errors = [], []
            with rival.attach(self.pipe, setting) as overrides:
                for run, reference in zip(self.runs, self.references, strict=True):
                    cost, result = self._count(run, overrides)
                    costs.append(cost)
                    error = (result.double() - reference.double()).square().mean().item()
                    errors.append(error if math.isfinite(error) else math.inf)  # an exploding run is the worst one
            fractions = [compute_fraction(a, b) for a, b in zip(costs, self.uncached, strict=True)]
            blocks, attention = (sum(getattr(c, n) for c in costs) for n in ("block_calls", "attention_calls"))
            self._measured[key] = Measured(setting, _mean(fractions), _mean(errors), blocks, attention)
        return self._measured[key]

    def tune(self, rival: Rival, wanted_fraction: float) -> Tuned:
        """Find the comparable setting whose cost is nearest to `wanted_fraction` from above.

        Of several variants, the one with the smallest error. If none is comparable: the cheapest that costs no less
        than asked, marked as not comparable; if all cost less, the dearest.

        Raises:
            NotApplicable: the rival cannot work on this pipeline.
        """
        self.prepare(rival)
        known = rival.setting_for(wanted_fraction, self.num_steps)
        if known is not None:
            made = self.measure(rival, known)
            comparable = is_comparable(made.fraction, wanted_fraction)
            return Tuned(made.setting, made.fraction, comparable, made.error)
        found = [self._bisect(rival, sweep, wanted_fraction) for sweep in rival.sweeps(self.num_steps)]
        within = [m for m in found if is_comparable(m.fraction, wanted_fraction)]
        above = [m for m in found if _reaches(m, wanted_fraction)]
        if within:
            best = min(within, key=lambda m: (m.error, m.fraction))
        elif above:
            best = min(above, key=lambda m: (m.fraction, m.error))
        else:
            best = max(found, key=lambda m: (m.fraction, -m.error))
        return Tuned(best.setting, best.fraction, bool(within), best.error)

    def _bisect(self, rival: Rival, sweep: list[Setting], wanted: float) -> Measured:
        """The first setting of `sweep`, cheap to dear, that costs `wanted` or more; the last if none does."""
        low, high = 0, len(sweep) - 1
        tried = []
        while low < high:
            middle = (low + high) // 2
            tried.append(self.measure(rival, sweep[middle]))
            low, high = (low, middle) if _reaches(tried[-1], wanted) else (middle + 1, high)
        tried.append(self.measure(rival, sweep[low]))
        # An online decision is not quite monotone in its knob, so the best of all tries counts, not the last.
        return min(tried, key=lambda m: (not _reaches(m, wanted), abs(m.fraction - wanted)))

    def _count_uncached(self) -> None:
        if self.uncached:
            return
        for run in self.runs:
            cost, result = self._count(run, {})
            self.uncached.append(cost)
            self.references.append(result)

    def _count(self, run: Run, overrides: dict[str, Any]) -> tuple[TransformerCost, Tensor]:
        with torch.no_grad(), TransformerCost(self.pipe.transformer) as cost:
            result = run(**overrides)
        return cost, result


def _reaches(measured: Measured, wanted: float) -> bool:
    return measured.fraction >= wanted - ROUNDING


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
