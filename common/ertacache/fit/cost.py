"""What a calibration costs: an upper bound of its evaluations, said before the first and compared after."""

import sys
from typing import Any

from ertacache.calibration import check_computed_steps, computed_steps_for
from ertacache.errors import CalibrationError
from ertacache.fit.predict import FOLDS, GUARD_PROMPTS
from ertacache.fit.runs import TRIED_STEPS, Runs
from ertacache.schema import CALIBRATED_METHODS

BEST_RUNS = 100  # uncached runs that effort "best" may cost in all


def most_evaluations(effort: str, prompts: int, steps: int, computed: int) -> int:
    """An upper bound of the transformer evaluations over P prompts, for K of N steps: P (N + 3 K), or BEST_RUNS N.

    P (N + K) for "fast", which predicts no quality. "best" fits end to end with what is left of BEST_RUNS.
    """
    tried = min(prompts, 2) * min(TRIED_STEPS, steps)
    if effort == "fast":
        return prompts * (steps + computed) + tried
    total = prompts * (steps + (1 + FOLDS) * computed) + tried + min(prompts, GUARD_PROMPTS) * computed
    return max(total, BEST_RUNS * steps) if effort == "best" else total


def goal_of(method: str, **given: Any) -> tuple[str, Any]:
    """The one goal that is given, with its value; raises CalibrationError for none or more."""
    if method not in CALIBRATED_METHODS:
        raise CalibrationError(f"method is {method!r}: it must be one of {', '.join(CALIBRATED_METHODS)}")
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise CalibrationError(f"give exactly one of {', '.join(given)}; got {', '.join(named) or 'none'}")
    if named[0] == "threshold" and method != "paper":
        raise CalibrationError(
            "threshold belongs to method='paper'; ask ertacache for speedup, computed_steps or min_psnr"
        )
    return named[0], given[named[0]]


def computed_steps_of(goal: tuple[str, Any], steps: int) -> int | None:
    """K of a goal that says it."""
    name, value = goal
    return computed_steps_for(steps, value) if name == "speedup" else value if name == "computed_steps" else None


class Cost:
    """Print what a calibration costs before its first evaluation, and what it took."""

    def __init__(self, goals: list[tuple[str, Any]], effort: str):
        self.goals, self.effort, self.steps = goals, effort, 0
        self.bar: Any = None

    def announce(self, bar: Any, prompts: int, steps: int) -> None:
        """Print the most that it takes; raises CalibrationError for a K that cannot be."""
        self.bar, self.steps, recorded = bar, steps, prompts * steps
        total, known = recorded + bar.n, []  # what was spent by a recording that could not be repeated too
        for goal in self.goals:
            computed = computed_steps_of(goal, steps)
            if computed is not None:
                check_computed_steps(steps, computed)
                known.append(str(computed))
            fitted = most_evaluations(self.effort, prompts, steps, steps if computed is None else computed) - recorded
            if goal[0] == "min_psnr":
                if self.effort == "fast" or prompts < FOLDS:
                    raise CalibrationError(
                        "min_psnr needs a prediction: two prompts or more, and more effort than fast"
                    )
                fitted *= steps.bit_length() + 1  # a calibration for every K that bisection tries
            total += fitted
        bar.total, said = total, f", {' and '.join(known)} computed" if known else ""
        self._print(bar, f"at most {self._in_runs(total)} for {prompts} prompts of {steps} steps{said}")

    def close(self, runs: Runs) -> None:
        """Print what it took."""
        self._print(runs.bar, f"took {self._in_runs(runs.bar.n)}")
        runs.bar.close()

    def say(self, text: str) -> None:
        """Print something else that a user has to know."""
        if self.bar is not None:
            self._print(self.bar, text)

    def _in_runs(self, evaluations: int) -> str:
        return f"{evaluations / self.steps:.3g} uncached runs ({evaluations} transformer evaluations)"

    def _print(self, bar: Any, text: str) -> None:
        if not bar.disable:
            bar.write(f"calibration: {text}", file=sys.stderr)
