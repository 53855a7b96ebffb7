"""Run one comparison from calibration to report: who competes, at which setting, in which order.

Ours and the rivals are calibrated and tuned on the calibration prompts, and measured on held-out ones.
"""

import hashlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

import ertacache
from compare import processes
from compare.comparison import Comparison, Contender
from compare.ledger import Ledger
from compare.lpips import Lpips, LpipsUnavailableError, load_lpips
from compare.pictures import vbench_name
from compare.rivals import NotApplicable, PromptRun, Rival, Tuner
from compare.rivals.fitted import FittedRival
from compare.study_output import row_of, write_outcome
from ertacache import provenance, solver
from ertacache.calibration import Calibration
from ertacache.cli import settings
from ertacache.cli.folder import ModelFolder, slug
from ertacache.cli.kept import (
    calibration_file_prompts,
    calibration_prompts,
    kept_path,
    new_calibration,
    phi_over,
)
from ertacache.cli.settings import Settings
from ertacache.errors import ERTACacheError, UsageError
from ertacache.fit.cost import most_evaluations

OURS = {"ertacache": None, "ertacache-best": "best"}  # name -> effort; None for that of the settings
OUR_METHODS = ("none", *OURS, "paper")
TIMING_REPEATS = 5
NUM_TUNING_PROMPTS = 2


class Study:
    """One comparison from calibration to report."""

    def __init__(
        self,
        pipe: Any,
        chosen: Settings,
        model: ModelFolder,
        prompts: list[str],
        counts: list[int],
        rivals: list[Rival],
    ):
        self.pipe, self.chosen, self.model, self.prompts = pipe, chosen, model, prompts
        self.counts, self.rivals = counts, rivals
        self.arguments = model.arguments(chosen)
        self.out = Path(chosen.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.calibration_prompts = calibration_prompts(chosen)
        both = set(calibration_file_prompts(chosen)) & set(prompts)  # a kept calibration may be of more than asked for
        if both:
            raise UsageError(f"prompt {sorted(both)[0]!r} is a calibration prompt: held-out prompts must be others")
        self.ledger = Ledger(self.out / ".progress", self._subject())
        self.not_applicable: dict[str, str] = {}
        self.perceptual, self.no_lpips = _lpips()

    def _subject(self) -> dict[str, Any]:
        return {
            "model": provenance.model_identity(self.pipe.transformer),
            "scheduler": solver.identity(self.pipe.scheduler),
            "arguments": self.arguments,
            "prompts": self.prompts,
            "calibration_prompts": self.calibration_prompts,
            "seeds": self.chosen.seeds,
            "effort": self.chosen.effort,
            "phi_over": phi_over(self.chosen),
            "layout": self.chosen.layout,
            "versions": provenance.package_versions(),
        }

    def run(self) -> Path:
        """Run all of it; an interrupted run goes on from the ledger."""
        comparison = Comparison(
            self.pipe,
            self.arguments,
            self.prompts,
            self.chosen.seeds,
            self.ledger,
            self.perceptual,
            self.chosen.micro_batch,
            self._save_for_vbench if self.chosen.layout == "vbench" else None,
        )
        comparison.prepare()
        contenders = [*self._ours(), *self._tuned_rivals()]
        seconds = comparison.estimate(sum(not c.static for c in contenders))
        if processes.is_main():
            print(
                f"comparison: {len(contenders)} settings on {len(comparison.pairs)} pairs of prompt and seed, "
                f"about {seconds / 60:.0f} min if none is done yet",
                file=sys.stderr,
            )
        reference = Contender("none", "reference", None, "uncached", nullcontext, static=True)
        times = comparison.times([reference, *contenders], TIMING_REPEATS)
        rows = [row_of(self, c, comparison, times) for c in [reference, *contenders]]
        write_outcome(self, rows, contenders, reference, comparison)
        return self.out

    def _save_for_vbench(self, contender: Contender, prompt: str, seed: int, result: Tensor) -> None:
        """Save to vbench/<method>/<prompt>-<index>, the index counting the seeds from 0."""
        name = vbench_name(prompt, self.chosen.seeds.index(seed)).removesuffix(".mp4")
        folder = self.out / "vbench" / slug(contender.name)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(result, folder / name, self.chosen)

    # -- who competes ------------------------------------------------------------------------------------

    def _ours(self) -> list[Contender]:
        asked = self.chosen.methods.split(",") if self.chosen.methods != "all" else OUR_METHODS
        contenders = []
        for count in self.counts:
            for name in (name for name in OURS if name in asked):
                contenders.append(self._static(name, "ours", count, self.calibration(name, count)))
            if "paper" in asked:
                contenders.append(self._static("paper", "rival", count, self.calibration("paper", count)))
        return contenders

    def _static(self, method: str, role: str, count: int, calibration: Calibration) -> Contender:
        reached = len(calibration.computed_steps)
        return Contender(
            method,
            role,
            count,
            f"K={reached}" if reached == count else f"K={reached}, asked {count}",
            lambda: ertacache.apply(self.pipe, calibration),
            static=True,
            computed_steps=calibration.computed_steps,
            comparable=role == "rival" and reached >= count,
            version=_version(calibration),
            calibration_runs=self._spent(method, reached) if role == "ours" else None,
        )

    def _spent(self, method: str, computed: int) -> float:
        """The most uncached runs that a calibration of ours cost."""
        steps, asking = self.chosen.num_inference_steps, self._asking(method, computed)
        return most_evaluations(asking.effort, len(calibration_prompts(asking)), steps, computed) / steps

    def calibration(self, method: str, count: int) -> Calibration:
        """The calibration of a method with so many computed steps: a kept one, or a new one."""
        asking = self._asking(method, count)
        kept = kept_calibration(self.pipe, asking, self.model) if method in OURS else None
        if kept is not None:
            return kept

        def make() -> dict[str, Any]:
            return new_calibration(self.pipe, asking, self.model).to_dict()

        return Calibration.from_dict(self.ledger.get(f"calibration {method} {count}", make))

    def _asking(self, method: str, count: int) -> Settings:
        """Settings of a run.sh that asks for so many computed steps of a method."""
        goals = dict.fromkeys(settings.GOALS)
        asking = {**vars(self.chosen), **goals, "method": method, "computed_steps": count}
        if method in OURS:
            asking |= {"method": "ertacache", "effort": OURS[method] or self.chosen.effort}
        return Settings(**asking)

    def _tuned_rivals(self) -> list[Contender]:
        prompts = calibration_file_prompts(self.chosen)
        runs = [PromptRun(self.pipe, prompt, seed, self.arguments) for seed, prompt in enumerate(prompts)]
        tuner = Tuner(self.pipe, runs[:NUM_TUNING_PROMPTS], self.chosen.num_inference_steps)
        contenders = []
        for rival in self.rivals:
            try:
                if isinstance(rival, FittedRival):
                    rival.folder = self.ledger.folder
                tuner.prepare(rival, runs[: rival.prompts or len(self.calibration_prompts)])
                contenders += [self._tuned(rival, tuner, count) for count in self.counts]
            except NotApplicable as reason:
                self.not_applicable[rival.name] = str(reason)
        return contenders

    def _tuned(self, rival: Rival, tuner: Tuner, count: int) -> Contender:
        def make() -> dict[str, Any]:
            tuned = tuner.tune(rival, count / self.chosen.num_inference_steps)
            if tuned.fraction > 0.999:
                raise ERTACacheError(f"rival {rival.name} skipped nothing at any setting: it is not attached right")
            return {"setting": tuned.setting, "comparable": tuned.comparable, "runs": rival.spent(tuned.setting)}

        tuned = self.ledger.get(f"setting of {rival.name} {count}", make)
        setting = tuned["setting"]
        return Contender(
            rival.name,
            "rival",
            count,
            ", ".join(f"{name}={value}" for name, value in setting.items()),
            lambda: rival.attach(self.pipe, setting),
            static=rival.static,
            knob=setting,
            comparable=tuned["comparable"],
            form=rival.form,
            calibration_runs=tuned["runs"],
        )


def kept_calibration(pipe: Any, settings: Settings, model: ModelFolder) -> Calibration | None:
    """Find the kept calibration of just the settings' effort, on the prompts of their file; None if none."""
    path = kept_path(pipe, settings, model, exact=True)
    if path is None:
        return None
    calibration = Calibration.load(path)
    prompts, count = calibration_file_prompts(settings), calibration.prompts.get("count")
    if not isinstance(count, int) or not len(calibration_prompts(settings)) <= count <= len(prompts):
        return None
    same = calibration.prompts.get("sha256") == provenance.prompts_hash(prompts[:count], range(count))
    return calibration if same else None


def _version(calibration: Calibration) -> str:
    """Tell a calibration from another of the same method and number of computed steps."""
    return hashlib.sha256(json.dumps(calibration.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def _lpips() -> tuple[Lpips | None, str]:
    try:
        return load_lpips(), ""
    except LpipsUnavailableError as reason:
        return None, str(reason)
