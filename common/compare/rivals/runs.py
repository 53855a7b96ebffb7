"""Runs of a pipeline on one prompt and seed, alone or several together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compare.rivals.base import Run


@dataclass(frozen=True)
class PromptRun:
    """Run the pipeline on one prompt and seed; the result is its final latents."""

    pipe: Any
    prompt: str
    seed: int
    arguments: dict[str, Any]

    def __call__(self, **overrides: Any) -> Tensor:
        return self._call(self.prompt, torch.Generator("cpu").manual_seed(self.seed), overrides)

    def _call(self, prompt: str | list[str], generator: Any, overrides: dict[str, Any]) -> Tensor:
        call = {**self.arguments, **overrides}
        return self.pipe(prompt=prompt, generator=generator, output_type="latent", **call)[0]

    @staticmethod
    def batch(runs: Sequence["PromptRun"], overrides: dict[str, Any]) -> Tensor:
        """The results of several runs of one pipeline, made in one call of it."""
        generators = [torch.Generator("cpu").manual_seed(run.seed) for run in runs]
        return runs[0]._call([run.prompt for run in runs], generators, overrides)


def batches(runs: Sequence[Run]) -> list[slice]:
    """Which runs can share a call of the pipeline: all of them where they are runs of prompts."""
    joint = all(isinstance(run, PromptRun) for run in runs)
    return [slice(0, len(runs))] if joint else [slice(row, row + 1) for row in range(len(runs))]


def together(runs: Sequence[Run], **overrides: Any) -> Tensor:
    """Results (P, ...) of several runs: in one call of the pipeline where they are runs of prompts."""
    prompts = [run for run in runs if isinstance(run, PromptRun)]
    if len(prompts) == len(runs) > 1:
        return PromptRun.batch(prompts, overrides)
    return torch.cat([run(**overrides) for run in runs])
