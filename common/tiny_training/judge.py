"""Prompt adherence: a small classifier, trained on rendered scenes, says what stands at each place.

A named object counts as followed when the judge sees its shape and its colour at its place. The judge's own
rate on rendered scenes that it never saw is the ceiling, and is reported beside every measurement.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_training.captions import parse_caption
from tiny_training.data import scene_for
from tiny_training.loop import Stage
from tiny_training.precision import autocast
from tiny_training.scene import COLOURS, PLACES, SHAPES

OUTPUTS = len(SHAPES) + 1 + len(COLOURS) + 1


class Judge(nn.Module):
    """Pixels (B, 3, 64, 64) in [0, 1] -> logits (B, places, shapes + 1) and (B, places, colours + 1)."""

    def __init__(self):
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())

        self.body = nn.Sequential(
            conv(3, 32, 1), conv(32, 48, 2), conv(48, 64, 1), conv(64, 96, 2), conv(96, 96, 1), conv(96, 96, 2)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(96 * 64, 256), nn.SiLU(), nn.Linear(256, len(PLACES) * OUTPUTS)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(pixels * 2 - 1)).unflatten(1, (len(PLACES), OUTPUTS))
        return logits[..., : len(SHAPES) + 1], logits[..., len(SHAPES) + 1 :]


def _labels(count: int, seed: int, moving: bool) -> Tensor:
    """(count, places, 2) class indices of shape and colour in the training scenes; 0 where nothing stands."""
    places, shapes, colours = list(PLACES), list(SHAPES), list(COLOURS)
    labels = torch.zeros(count, len(places), 2, dtype=torch.long)
    for index in range(count):
        for obj in scene_for(index, seed, moving).objects:
            labels[index, places.index(obj.place)] = torch.tensor(
                (shapes.index(obj.shape) + 1, colours.index(obj.colour) + 1)
            )
    return labels


def train_judge(
    pixels: np.ndarray, seed: int, *, num_steps: int, folder: Path, device: str = "cpu", moving: bool = False
) -> Judge:
    """Train on rendered stills `pixels`, uint8 (n, 64, 64, 3), of the scene set `seed`."""
    labels = _labels(len(pixels), seed, moving).to(device)
    judge = Judge().to(device)

    def loss(step: int) -> Tensor:
        chosen = np.sort(np.random.default_rng((29, step)).integers(0, len(pixels), 64))
        batch = torch.from_numpy(pixels[chosen]).to(device).permute(0, 3, 1, 2).float() / 255
        with autocast(device):
            answers = judge(batch)
        wanted = labels[torch.from_numpy(chosen).to(device)]
        parts = [F.cross_entropy(a.float().flatten(0, 1), wanted[..., i].flatten()) for i, a in enumerate(answers)]
        return sum(parts)

    return Stage("judge", judge, loss, num_steps, 1e-3, folder).run()


@torch.no_grad()
def followed_objects(judge: Judge, pixels: Tensor, prompts: list[str]) -> list[list[bool]]:
    """For every prompt and every object named in it: does the judge see its shape and colour at its place?

    Args:
        pixels: (n, 3, 64, 64) in [0, 1], one picture a prompt.
    """
    places, shapes, colours = list(PLACES), list(SHAPES), list(COLOURS)
    shape_logits, colour_logits = judge(pixels)
    followed = []
    for row, prompt in enumerate(prompts):
        answers = []
        for obj in parse_caption(prompt)[0]:
            place = places.index(obj.place)
            right_shape = int(shape_logits[row, place].argmax()) == shapes.index(obj.shape) + 1
            right_colour = int(colour_logits[row, place].argmax()) == colours.index(obj.colour) + 1
            answers.append(right_shape and right_colour)
        followed.append(answers)
    return followed


def adherence(judge: Judge, pixels: Tensor, prompts: list[str]) -> float:
    """Share of the objects named in `prompts` whose shape and colour the judge sees at their place.

    Args:
        pixels: (n, 3, 64, 64) in [0, 1], one picture a prompt.
    """
    return float(np.mean([each for answers in followed_objects(judge, pixels, prompts) for each in answers]))
