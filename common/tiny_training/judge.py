"""Prompt adherence: a small classifier, trained on the source's pictures, says what a picture shows.

A sample counts when the named thing is among the first five of fifty. The judge's own rate on pictures that it never
saw is the ceiling, and is reported beside every measurement.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_training.loop import Stage
from tiny_training.precision import autocast
from tiny_training.sources import Source

BATCH = 64
AMONG, FIRST = 50, 5


class Judge(nn.Module):
    """Pixels (B, 3, 64, 64) in [0, 1] -> logits (B, names)."""

    def __init__(self, num_names: int):
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())

        self.body = nn.Sequential(conv(3, 32, 2), conv(32, 64, 2), conv(64, 128, 2), conv(128, 128, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128 * 64, 256), nn.SiLU(), nn.Linear(256, num_names))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels * 2 - 1))


def train_judge(source: Source, pixels: np.ndarray, *, num_steps: int, folder: Path, device: str = "cpu") -> Judge:
    """Train on frames of the first examples of the source, `pixels`, uint8 (n, F, 64, 64, 3)."""
    labels = torch.tensor([source.label(index) for index in range(len(pixels))])
    judge = Judge(len(source.names)).to(device)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((29, step))
        chosen, frames = rng.integers(0, pixels.shape[:2], (BATCH, 2)).T
        batch = torch.from_numpy(pixels[chosen, frames]).to(device).permute(0, 3, 1, 2).float() / 255
        with autocast(device):
            logits = judge(batch)
        return F.cross_entropy(logits.float(), labels[chosen].to(device))

    return Stage(f"judge-{source.key}", judge, loss, num_steps, 1e-3, folder).run()


@torch.no_grad()
def recognised(judge: Judge, pixels: Tensor, labels: list[int], among: int = AMONG, first: int = FIRST) -> float:
    """Share of pictures whose subject is one of the judge's `first` guesses among it and others.

    Args:
        pixels: (n, 3, F, 64, 64) in [0, 1]; the guesses of a clip are of all its frames together.
        labels: which name each one should show; `among` - 1 others are drawn beside it, the same ones every time.
    """
    hits = []
    for number, (clip, label) in enumerate(zip(pixels, labels, strict=True)):
        logits = judge(clip.transpose(0, 1)).log_softmax(1).mean(0)
        others = np.random.default_rng((31, number)).permutation(len(logits))
        others = others[others != label][: among - 1]
        hits.append(int((logits[others] > logits[label]).sum()) < first)
    return float(np.mean(hits))
