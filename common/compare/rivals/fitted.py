"""What rivals share that are fitted for a number of evaluations: what was fitted is kept, and work resumes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compare.rivals.base import NotApplicable, Rival, Run, Setting
from compare.rivals.linear import LinearSolver
from compare.rivals.runs import PromptRun
from ertacache.files import write_atomically

BATCH = 8  # prompts in a call of the pipeline


class FittedRival(Rival):
    """A rival that computes `num_steps` steps and is fitted for that number.

    Attributes:
        folder: where fits are kept; None keeps them in memory.
    """

    knob = "num_steps"
    static = True

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.runs: list[Run] = []
        self.steps = 0  # of the uncached run
        self.fits: dict[int, dict[str, Any]] = {}

    def prepare(self, pipe: Any, runs: Sequence[Run], num_steps: int) -> None:
        self.runs, self.steps = list(runs), num_steps

    def settings(self, num_steps: int) -> list[Setting]:
        return [{"num_steps": count} for count in range(2, num_steps)]

    def setting_for(self, wanted_fraction: float, num_steps: int) -> Setting:
        return {"num_steps": max(2, round(wanted_fraction * num_steps))}

    def spent(self, setting: Setting) -> float | None:
        count = int(setting["num_steps"])
        return (self.fits.get(count) or _read(self.path(count, ".json")) or {}).get("runs")

    def fit(self, pipe: Any, count: int) -> dict[str, Any]:
        """Fit for `count` evaluations; plain values, `runs` among them: what it cost in uncached runs."""
        raise NotImplementedError

    def fitted(self, pipe: Any, count: int) -> dict[str, Any]:
        """What was fitted for `count` evaluations: from memory, from the folder, or made now.

        Raises:
            NotApplicable: there is nothing to fit to, or the uncached run has fewer steps.
        """
        if not self.runs:
            raise NotApplicable(f"{self.name} has nothing to be fitted to yet: call prepare")
        if count > self.steps:
            raise NotApplicable(f"{self.name} is fitted to an uncached run of {self.steps} steps: {count} are too many")
        if count not in self.fits:
            self.fits[count] = self.kept(count, ".json", lambda: self.fit(pipe, count))
        return self.fits[count]

    def kept(self, count: int, suffix: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the folder has under this name, or what is made now and put there."""
        path = self.path(count, suffix)
        made = _read(path)
        if made is None:
            made = make()
            if path is not None:
                write_atomically(path, json.dumps(made))
        return made

    def path(self, count: int, suffix: str) -> Path | None:
        """A file of a fit, named by what it depends on; None where nothing is kept."""
        if self.folder is None:
            return None
        given = [(run.prompt, run.seed) for run in self.runs if isinstance(run, PromptRun)]
        digest = hashlib.sha256(json.dumps([given, self.steps]).encode()).hexdigest()[:12]
        return self.folder / f"{self.name}-{count}-{digest}{suffix}"


def _read(path: Path | None) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None


class LinearRival(FittedRival):
    """One whose fit is a linear solver, under "solver"."""

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        solver = LinearSolver.from_dict(self.fitted(pipe, int(setting["num_steps"]))["solver"])
        with solver.played(pipe) as overrides:
            yield overrides
