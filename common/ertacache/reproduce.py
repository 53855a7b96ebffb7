"""What reproduce.sh does in every model folder: the paper's table on the model that runs, with all rivals.

Ours and the rivals are calibrated and tuned on the calibration prompts, and measured on held-out ones.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ertacache
from ertacache import ablation, provenance, settings
from ertacache.baselines import NotApplicable, Rival, Tuner, all_rivals
from ertacache.calibration import Calibration
from ertacache.comparison import Comparison, Contender
from ertacache.errors import ERTACacheError
from ertacache.generation import ModelFolder, latents_run, slug
from ertacache.ledger import Ledger
from ertacache.lpips import Lpips, LpipsUnavailableError, load_lpips
from ertacache.metrics import worst_decile
from ertacache.report import write_report
from ertacache.results import Curve, Row, write_results
from ertacache.runs import Runs, recorded_runs
from ertacache.settings import Settings, UsageError
from ertacache.table import table_markdown
from ertacache.videos import vbench_name

OUR_METHODS = ("none", "ertacache", "paper", "ablation")
TIMING_REPEATS = 5
NUM_TUNING_PROMPTS = 2
STATIC_RIVALS = ("fewer-steps", "multistep")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 14,11,9") from None


FLAGS = (
    ("--seeds", {"type": _numbers, "default": [1000, 1001], "metavar": "S1,S2", "help": "seeds of the noise"}),
    ("--methods", {"default": "all", "metavar": "A,B", "help": "methods to run (default: all)"}),
    ("--computed-steps", {"type": _numbers, "default": None, "metavar": "K1,K2", "help": "default: N/2, 2N/5, N/3"}),
    ("--prompts", {"default": None, "metavar": "FILE", "help": "prompts to measure on (default: held out)"}),
    ("--num-prompts", {"type": int, "default": 24, "metavar": "INT", "help": "use the first ones of the file"}),
    (
        "--layout",
        {
            "default": "plain",
            "choices": ["plain", "vbench"],
            "help": "vbench: also write every result, named for VBench",
        },
    ),
    ("--out", {"default": "reproduced", "metavar": "DIR", "help": "default: ./reproduced"}),
)


def main(folder: Path, load: Callable[[Settings], Any], model: ModelFolder, argv: Sequence[str] | None = None) -> Path:
    """Compare on the folder's model and write results.json, table.md and report.html; returns the output folder."""
    chosen = settings.parse(folder, argv, "Compare ERTACache with its rivals on this model.", extra=FLAGS)
    counts, chosen.computed_steps = chosen.computed_steps, None
    chosen.method = "none"  # the study sets methods and costs itself
    rivals = _rivals(chosen.methods, model)
    path = Path(chosen.prompts) if chosen.prompts else folder / "prompts" / "held_out.txt"
    prompts = settings.read_prompts(path)[: chosen.num_prompts]
    pipe = load(chosen)
    n = chosen.num_inference_steps
    counts = counts or [n // 2, 2 * n // 5, n // 3]
    for count in counts:
        if not 1 <= count <= n:
            raise UsageError(f"--computed-steps must lie between 1 and {n}, not {count}")
    pipe.set_progress_bar_config(disable=True)
    study = Study(pipe, chosen, model, prompts, counts, rivals)
    return study.run()


def _rivals(methods: str, model: ModelFolder) -> list[Rival]:
    rivals = all_rivals(model.teacache_signal)
    if methods == "all":
        return rivals
    asked = methods.split(",")
    unknown = sorted(set(asked) - {r.name for r in rivals} - set(OUR_METHODS))
    if unknown:
        known = ", ".join([*OUR_METHODS, *(r.name for r in rivals)])
        raise UsageError(f"--methods knows no {unknown[0]!r}; it knows {known}")
    return [rival for rival in rivals if rival.name in asked]


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
        self.calibration_prompts = settings.read_prompts(chosen.path("calibration_prompts"))
        self.calibration_prompts = self.calibration_prompts[: chosen.num_calibration_prompts]
        both = set(self.calibration_prompts) & set(prompts)
        if both:
            raise UsageError(f"prompt {sorted(both)[0]!r} is a calibration prompt: held-out prompts must be others")
        self.ledger = Ledger(self.out / ".progress", self._subject())
        self.not_applicable: dict[str, str] = {}
        self.perceptual, self.no_lpips = _lpips()

    def _subject(self) -> dict[str, Any]:
        return {
            "model": provenance.model_identity(self.pipe.transformer),
            "arguments": self.arguments,
            "prompts": self.prompts,
            "calibration_prompts": self.calibration_prompts,
            "seeds": self.chosen.seeds,
            "search_budget": self.chosen.search_budget,
            "layout": self.chosen.layout,
            "versions": provenance.library_versions(),
        }

    def run(self) -> Path:
        """All of it; a run that was interrupted goes on from what is in the ledger."""
        comparison = Comparison(
            self.pipe,
            self.arguments,
            self.prompts,
            self.chosen.seeds,
            self.ledger,
            self.perceptual,
            self._save_for_vbench if self.chosen.layout == "vbench" else None,
        )
        comparison.prepare()
        contenders = [*self._ours(), *self._tuned_rivals()]
        seconds = comparison.estimate(sum(not c.static for c in contenders))
        print(
            f"comparison: {len(contenders)} settings on {len(comparison.pairs)} pairs of prompt and seed, "
            f"about {seconds / 60:.0f} min if none is done yet",
            file=sys.stderr,
        )
        reference = Contender("none", "reference", None, "uncached", nullcontext, static=True)
        times = comparison.times([reference, *contenders], TIMING_REPEATS)
        rows = [self._row(c, comparison, times) for c in [reference, *contenders]]
        self._write(rows, contenders, reference, comparison)
        return self.out

    def _save_for_vbench(self, contender: Contender, prompt: str, seed: int, result: Tensor) -> None:
        """vbench/<method>/<prompt>-<index>, the index counting the seeds from 0, as VBench counts its samples."""
        name = vbench_name(prompt, self.chosen.seeds.index(seed)).removesuffix(".mp4")
        folder = self.out / "vbench" / slug(contender.name)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(result, folder / name, self.chosen)

    # -- who competes ------------------------------------------------------------------------------------

    def _ours(self) -> list[Contender]:
        asked = self.chosen.methods.split(",") if self.chosen.methods != "all" else OUR_METHODS
        runs = None
        contenders = []
        for count in self.counts:
            ours = self._calibration("ertacache", count)
            if "ertacache" in asked:
                contenders.append(self._static("ertacache", "ours", count, ours))
            if "paper" in asked:
                contenders.append(self._static("paper", "rival", count, self._calibration("paper", count)))
            if "ablation" in asked:
                kept = self.ledger.path(f"ablation {count}", ".json")
                if runs is None and not kept.exists():
                    runs = self._recorded()
                plain = self.ledger.get(f"ablation {count}", lambda r=runs, k=count, o=ours: self._ablation(r, k, o))
                contenders += [
                    self._static(name, "ablation", count, Calibration.from_dict(c)) for name, c in plain.items()
                ]
        return contenders

    def _static(self, method: str, role: str, count: int, calibration: Calibration) -> Contender:
        reached = len(calibration.computed_steps)
        return Contender(
            method,
            role,
            count,
            f"K={reached} of {count}",
            lambda: ertacache.apply(self.pipe, calibration),
            static=True,
            computed_steps=calibration.computed_steps,
            comparable=role == "rival" and reached >= count,
        )

    def _calibration(self, method: str, count: int) -> Calibration:
        def make() -> dict[str, Any]:
            prompts = self.calibration_prompts
            budget = self.chosen.search_budget if method == "ertacache" else 0
            made = ertacache.calibrate(
                self.pipe,
                prompts,
                seeds=range(len(prompts)),
                computed_steps=count,
                method=method,
                search_budget=budget,
                **self.arguments,
            )
            return made.to_dict()

        return Calibration.from_dict(self.ledger.get(f"calibration {method} {count}", make))

    def _recorded(self) -> Runs:
        prompts = self.calibration_prompts
        return recorded_runs(self.pipe, prompts, seeds=range(len(prompts)), **self.arguments)

    def _ablation(self, runs: Runs, count: int, ours: Calibration) -> dict[str, Any]:
        parts = ablation.ablations(runs, count, ours.computed_steps, self.chosen.search_budget)
        return {name: calibration.to_dict() for name, calibration in parts.items()}

    def _tuned_rivals(self) -> list[Contender]:
        runs = [
            latents_run(self.pipe, prompt, seed, self.arguments) for seed, prompt in enumerate(self.calibration_prompts)
        ]
        tuner = Tuner(self.pipe, runs[:NUM_TUNING_PROMPTS], self.chosen.num_inference_steps)
        contenders = []
        for rival in self.rivals:
            try:
                tuner.prepare(rival, runs)
                contenders += [self._tuned(rival, tuner, count) for count in self.counts]
            except NotApplicable as reason:
                self.not_applicable[rival.name] = str(reason)
        return contenders

    def _tuned(self, rival: Rival, tuner: Tuner, count: int) -> Contender:
        def make() -> dict[str, Any]:
            tuned = tuner.tune(rival, count / self.chosen.num_inference_steps)
            if tuned.fraction > 0.999:
                raise ERTACacheError(f"rival {rival.name} skipped nothing at any setting: it is not attached right")
            return {"setting": tuned.setting, "comparable": tuned.comparable}

        tuned = self.ledger.get(f"tuned {rival.name} {count}", make)
        setting = tuned["setting"]
        return Contender(
            rival.name,
            "rival",
            count,
            ", ".join(f"{name}={value}" for name, value in setting.items()),
            lambda: rival.attach(self.pipe, setting),
            static=rival.name in STATIC_RIVALS,
            knob=setting,
            comparable=tuned["comparable"],
        )

    # -- what is written ---------------------------------------------------------------------------------

    def _row(self, contender: Contender, comparison: Comparison, times: dict[str, float]) -> Row:
        measured = comparison.quality(contender)
        seconds, uncached = times[contender.name], times["none uncached"]
        values: dict[str, Any] = {}
        for name, higher in (("psnr", True), ("ssim", True), ("lpips", False)):
            items = measured[name]
            values[name] = sum(items) / len(items) if items else None
            values[name + "_p10"] = float(worst_decile(items, higher)) if items else None
        temporal = measured.get("temporal_error")
        return Row(
            model=f"{self.model.name} {self.chosen.model}",
            method=contender.method,
            role=contender.role,
            setting=contender.setting,
            num_inference_steps=self.chosen.num_inference_steps,
            computed_steps=contender.computed_steps,
            compute_fraction=comparison.fraction(contender) if contender.role != "reference" else 1.0,
            denoise_seconds=seconds,
            speedup=uncached / seconds,
            **values,
            n=len(comparison.pairs),
            prompts_sha256=provenance.prompts_hash(self.prompts),
            seeds=list(self.chosen.seeds),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            dtype=self.chosen.dtype,
            versions=provenance.library_versions(),
            temporal_error=sum(temporal) / len(temporal) if temporal else None,
            asked_steps=contender.asked_steps,
            knob=contender.knob,
            comparable=contender.comparable,
            reasons={} if self.perceptual else {"lpips": self.no_lpips},
        )

    def _write(
        self, rows: list[Row], contenders: list[Contender], reference: Contender, comparison: Comparison
    ) -> None:
        meta = {
            "title": f"ERTACache and its rivals on {rows[0].model}",
            "date": date.today().isoformat(),
            "prompts": f"{len(self.prompts)} held-out prompts, seeds {', '.join(map(str, self.chosen.seeds))}",
            "calibration": f"{len(self.calibration_prompts)} other prompts, swap search of {self.chosen.search_budget}",
            "settings": {k: v for k, v in self.arguments.items() if isinstance(v, (int, float, str))},
            "not applicable": self.not_applicable,
        }
        write_results(self.out / "results.json", rows, meta)
        (self.out / "table.md").write_text(table_markdown(rows))
        shown = [c for c in contenders if c.role != "ablation"]
        curves: dict[str, list[Curve]] = {}
        for contender in shown:
            error = comparison.error_per_step(contender)
            if error is not None:
                curves.setdefault(contender.method, []).append(
                    Curve(error, contender.computed_steps, contender.asked_steps)
                )
        examples = [example for c in [reference, *shown] for example in self._examples(c, comparison)]
        write_report(self.out / "report.html", rows, examples, curves, meta)
        print(f"results.json, table.md and report.html are in {self.out}")

    def _examples(self, contender: Contender, comparison: Comparison) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "seed": seed,
                "method": contender.method,
                "computed_steps": contender.asked_steps,
                "image": image,
            }
            for (prompt, seed), image in zip(comparison.pairs, comparison.examples(contender), strict=False)
        ]


def _lpips() -> tuple[Lpips | None, str]:
    try:
        return load_lpips(), ""
    except LpipsUnavailableError as reason:
        return None, str(reason)
