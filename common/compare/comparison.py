"""Run methods side by side on one pipeline and measure each against the uncached output.

Every contender runs on the same prompts and seeds. Its cost is counted in FLOPs of the transformer, and timed in turns
with the others. Finished pieces go to a ledger, so a comparison resumes. Several processes share out the batches of
prompts; each measures its own results, and only numbers and examples are gathered.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from compare import processes
from compare.flops import TransformerCost, compute_fraction
from compare.ledger import Ledger
from compare.lpips import Lpips
from ertacache import metrics
from ertacache.cli.media import to_uint8
from ertacache.cli.timing import DenoiseTimer

NUM_EXAMPLES = 6
NUM_COST_RUNS = 3


@dataclass(frozen=True)
class Contender:
    """One method at one setting.

    Attributes:
        attach: makes the pipeline run with it; yields pipeline arguments to override.
        static: its schedule is known before the run, so prompts may share a batch.
        version: tells it from others of the same name, such as another calibration for as many steps.
        form, calibration_runs: see `results.Row`.
    """

    method: str
    role: str
    asked_steps: int | None
    setting: str
    attach: Callable[[], AbstractContextManager[Any]]
    static: bool = False
    computed_steps: list[int] | None = None
    knob: dict[str, Any] | None = None
    comparable: bool = False
    version: str = ""
    form: str = ""
    calibration_runs: float | None = None

    @property
    def key(self) -> str:
        """The ledger's key of its results."""
        return f"{self.name} {self.version}".strip()

    @property
    def name(self) -> str:
        """Name of what is run; rows of different asked costs with the same setting share its results."""
        return f"{self.method} {self.setting}"


class Comparison:
    """A pipeline, the prompts and seeds to measure on, and the uncached results."""

    def __init__(
        self,
        pipe: Any,
        arguments: dict[str, Any],
        prompts: Sequence[str],
        seeds: Sequence[int],
        ledger: Ledger,
        perceptual: Lpips | None,
        batch: int = 1,
        keep: Callable[[Contender, str, int, Tensor], None] | None = None,
    ):
        """`batch` prompts share a run where a method allows it; `keep` is given every result that is measured."""
        self.pipe, self.arguments, self.keep = pipe, arguments, keep
        self.pairs = [(prompt, seed) for seed in seeds for prompt in prompts]
        starts = range(0, len(self.pairs), batch)
        # (index of its first pair, pairs): whole batches, so that several processes make what one would make
        self.share = processes.shared_out([(start, self.pairs[start : start + batch]) for start in starts])
        self.ledger, self.perceptual = ledger, perceptual
        self.reference: list[Tensor] = []  # of this process's share, a tensor for each batch
        self.reference_latents: list[Tensor] = []
        self.flops: list[TransformerCost] = []

    def prepare(self) -> None:
        """Make the uncached results and count their cost."""
        self.reference = self._pictures(Contender("none", "reference", None, "uncached", nullcontext, static=True))
        self.flops = self._costs(None)
        self.reference_latents = self._trajectory(nullcontext)

    def _call(self, pairs: Sequence[tuple[str, int]], output_type: str, overrides: Any, **extra: Any) -> Tensor:
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in pairs]
        arguments = {**self.arguments, **(overrides if isinstance(overrides, dict) else {}), **extra}
        with torch.no_grad():
            result = self.pipe(
                prompt=[prompt for prompt, _ in pairs], generator=generators, output_type=output_type, **arguments
            )
        return torch.as_tensor(result[0]).float().cpu()

    def _pictures(self, contender: Contender) -> list[Tensor]:
        """Results of this process's share, one tensor per batch."""
        made = []
        silent = not processes.is_main()
        with contender.attach() as overrides:
            for _, pairs in tqdm(self.share, desc=contender.name[:40], leave=False, mininterval=1, disable=silent):
                runs = [pairs] if contender.static else [[pair] for pair in pairs]
                made.append(torch.cat([self._call(run, "pt", overrides) for run in runs]))
        return made

    # -- measurements ------------------------------------------------------------------------------------

    def quality(self, contender: Contender) -> dict[str, Any]:
        """Measure per-item metrics; keep pictures of the first prompts for the report."""

        def measure() -> dict[str, Any]:
            made = self._pictures(contender)
            self._save_examples(contender, made)
            for (_, pairs), pictures in zip(self.share, made, strict=True):
                for (prompt, seed), picture in zip(pairs, pictures, strict=True):
                    if self.keep:
                        self.keep(contender, prompt, seed, picture)
            return _joined(processes.gathered([self._metrics(made)]))

        self.ledger.folder.mkdir(parents=True, exist_ok=True)
        return self.ledger.get("quality " + contender.key, measure)

    def _save_examples(self, contender: Contender, made: list[Tensor]) -> None:
        mine = [
            to_uint8(pictures[: NUM_EXAMPLES - start])
            for (start, _), pictures in zip(self.share, made, strict=True)
            if start < NUM_EXAMPLES
        ]
        examples = processes.gathered(mine)
        if processes.is_main():
            np.save(self._example_path(contender), np.concatenate(examples))

    def _example_path(self, contender: Contender) -> Any:
        return self.ledger.path("example " + contender.key, ".npy")

    def examples(self, contender: Contender) -> np.ndarray:
        """Pictures (n, H, W, 3) or videos (n, F, H, W, 3) of the first prompts, uint8."""
        return np.load(self._example_path(contender))

    def _metrics(self, made: list[Tensor]) -> dict[str, Any]:
        """Each metric of each item of this process's share; empty if it has none."""
        pairs = zip(made, self.reference, strict=True)
        return _joined([self._batch_metrics(pictures, reference) for pictures, reference in pairs])

    def _batch_metrics(self, pictures: Tensor, reference: Tensor) -> dict[str, Any]:
        measured = {
            "psnr": metrics.psnr(pictures, reference).tolist(),
            "ssim": metrics.ssim(pictures, reference).tolist(),
            "lpips": self.perceptual(pictures, reference).tolist() if self.perceptual else None,
        }
        if pictures.ndim == 5:
            measured["temporal_error"] = metrics.temporal_error(pictures, reference).tolist()
        return measured

    def fraction(self, contender: Contender) -> float:
        """Count the transformer's FLOPs as a fraction of the uncached run's; mean over a few prompts."""

        def measure() -> float:
            with contender.attach() as overrides:
                pairs = zip(self._costs(overrides), self.flops, strict=True)
                return float(np.mean([compute_fraction(run, uncached) for run, uncached in pairs]))

        return self.ledger.get("fraction " + contender.key, measure)

    def _costs(self, overrides: Any) -> list[TransformerCost]:
        costs = []
        for pair in self.pairs[:NUM_COST_RUNS]:
            with TransformerCost(self.pipe.transformer) as cost:
                self._call([pair], "latent", overrides)
            costs.append(cost)
        return costs

    def error_per_step(self, contender: Contender) -> list[float] | None:
        """RMS distance of the latents after each step to the uncached ones; None if the steps differ."""

        def measure() -> list[float] | None:
            trajectory = self._trajectory(contender.attach)
            if len(trajectory) != len(self.reference_latents):
                return None
            pairs = zip(trajectory, self.reference_latents, strict=True)
            return [float((made - reference).square().mean().sqrt()) for made, reference in pairs]

        return self.ledger.get("curve " + contender.key, measure)

    def _trajectory(self, attach: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
        latents: list[Tensor] = []

        def keep(_: Any, __: int, ___: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
            latents.append(state["latents"].detach().float().cpu())
            return state

        with attach() as overrides:
            self._call(self.pairs[:1], "latent", overrides, callback_on_step_end=keep)
        return latents

    def times(self, contenders: Sequence[Contender], repeats: int) -> dict[str, float]:
        """Median seconds of the denoising loop; one prompt per run, all contenders in turn in each repeat."""

        def measure() -> dict[str, float]:
            seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
            for repeat in tqdm(range(repeats + 1), desc="time", leave=False):  # by the main process alone
                for contender in {c.name: c for c in contenders}.values():
                    with contender.attach() as overrides, DenoiseTimer(self.pipe) as timer:
                        self._call(self.pairs[:1], "latent", overrides)
                    if repeat > 0:  # the first round warms up
                        seconds[contender.name] += timer.seconds
            return {name: float(np.median(values)) for name, values in seconds.items()}

        return self.ledger.get("times " + " | ".join(sorted({c.key for c in contenders})), measure, alone=True)

    def estimate(self, num_contenders: int) -> float:
        """Estimate the seconds for so many contenders from one uncached run."""
        start = time.perf_counter()
        self._call(self.pairs[:1], "pt", None)
        return 0.6 * (time.perf_counter() - start) * len(self.pairs) * num_contenders / processes.count()


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the metrics of several parts in order; None for a metric that was not measured."""
    filled = [part for part in parts if part]
    if not filled:
        return {}
    return {
        name: None if values is None else [value for part in filled for value in part[name]]
        for name, values in filled[0].items()
    }
