"""Held-out quality of a calibration on a tiny pipeline, for the benches that vary one thing at a time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ertacache
from ertacache.calibration import Calibration
from ertacache.cli.settings import read_prompts
from ertacache.metrics import psnr, worst_decile

FIRST_SEED = 1000
BATCH = 4  # prompts a call


class HeldOut:
    """Prompts that no calibration sees, and what the uncached pipeline makes of them.

    Args:
        arguments: keyword arguments of the pipeline, num_inference_steps included.
        count: how many of the folder's held-out prompts.
        first_seed: of the noise of the first one; calibration prompts take seeds from 0.
    """

    def __init__(self, pipe: Any, folder: Path, arguments: dict[str, Any], count: int, first_seed: int = FIRST_SEED):
        self.pipe, self.arguments, self.first_seed = pipe, arguments, first_seed
        self.prompts = read_prompts(folder / "prompts" / "held_out.txt")[:count]
        self.reference = self.sample()

    def sample(self, **overrides: Any) -> Tensor:
        """Pixels in [0, 1] of every prompt."""
        pieces = []
        for start in range(0, len(self.prompts), BATCH):
            prompts = self.prompts[start : start + BATCH]
            seeds = range(self.first_seed + start, self.first_seed + start + len(prompts))
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            with torch.no_grad():
                result = self.pipe(
                    prompt=prompts, generator=generators, output_type="pt", **{**self.arguments, **overrides}
                )
            pieces.append(result[0].float().cpu())
        return torch.cat(pieces)

    def of(self, calibration: Calibration) -> dict[str, float]:
        """psnr and psnr_p10 in dB with the calibration attached."""
        with ertacache.apply(self.pipe, calibration):
            return self.against_reference(self.sample())

    def of_fewer_steps(self, steps: int) -> dict[str, float]:
        """The same of the uncached pipeline with fewer steps."""
        return self.against_reference(self.sample(num_inference_steps=steps))

    def against_reference(self, made: Tensor) -> dict[str, float]:
        values = psnr(made, self.reference)
        return {"psnr": float(values.mean()), "psnr_p10": float(worst_decile(values, True))}
