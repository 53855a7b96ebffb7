"""Prompt adherence of clips: what stands at each place in the first frame, and where it moves from there.

The first frame is judged as a still picture; a second small classifier, trained on rendered clips, says of each
place whether what stands there at first moves and in which direction.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_training.captions import parse_caption
from tiny_training.data import scene_for
from tiny_training.judge import Judge, followed_objects
from tiny_training.loop import Stage
from tiny_training.precision import autocast
from tiny_training.scene import DIRECTIONS, PLACES

SEEN_FRAMES = 5
EMPTY, STILL, FIRST_DIRECTION = 0, 1, 2
CLASSES = FIRST_DIRECTION + len(DIRECTIONS)


def seen_frames(num_frames: int) -> list[int]:
    """Indices of the frames that the motion judge sees, first to last."""
    return [round(i * (num_frames - 1) / (SEEN_FRAMES - 1)) for i in range(SEEN_FRAMES)]


class MotionJudge(nn.Module):
    """Clips (B, 3, F, 64, 64) in [0, 1] -> logits (B, places, empty, still and each direction)."""

    def __init__(self):
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())

        self.body = nn.Sequential(conv(3 * SEEN_FRAMES, 48, 1), conv(48, 64, 2), conv(64, 96, 1), conv(96, 96, 2))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(96 * 64, 256), nn.SiLU(), nn.Linear(256, len(PLACES) * CLASSES)
        )

    def forward(self, clips: Tensor) -> Tensor:
        frames = clips[:, :, seen_frames(clips.shape[2])].flatten(1, 2)
        # a quarter of the pixels is enough for directions
        return self.head(self.body(F.avg_pool2d(frames, 2) * 2 - 1)).unflatten(1, (len(PLACES), CLASSES))


def _labels(count: int, seed: int) -> Tensor:
    """(count, places) motion classes in the training scenes."""
    places, directions = list(PLACES), list(DIRECTIONS)
    labels = torch.full((count, len(places)), EMPTY)
    for index in range(count):
        for obj in scene_for(index, seed, moving=True).objects:
            moving = FIRST_DIRECTION + directions.index(obj.direction) if obj.direction else STILL
            labels[index, places.index(obj.place)] = moving
    return labels


def train_motion_judge(
    pixels: np.ndarray, seed: int, *, num_steps: int, folder: Path, device: str = "cpu"
) -> MotionJudge:
    """Train on rendered clips `pixels`, uint8 (n, F, 64, 64, 3), of the scene set `seed`."""
    labels = _labels(len(pixels), seed).to(device)
    judge = MotionJudge().to(device)
    frames = seen_frames(pixels.shape[1])

    def loss(step: int) -> Tensor:
        chosen = np.random.default_rng((31, step)).integers(0, len(pixels), 48)
        batch = np.stack([pixels[i][frames] for i in chosen])
        clips = torch.from_numpy(batch).to(device).permute(0, 4, 1, 2, 3).float() / 255
        with autocast(device):
            logits = judge(clips)
        return F.cross_entropy(logits.float().flatten(0, 1), labels[torch.from_numpy(chosen).to(device)].flatten())

    return Stage("motion", judge, loss, num_steps, 1e-3, folder).run()


@torch.no_grad()
def clip_adherence(judge: Judge, motion: MotionJudge, clips: Tensor, prompts: list[str]) -> dict[str, float]:
    """Shares of the named objects that are as the prompts say.

    Args:
        clips: (n, 3, F, 64, 64) in [0, 1], one clip a prompt.

    Returns:
        `first_frame`: shape and colour at the place; `motion`: direction, of objects whose direction is named;
        `all`: shape, colour and, where it is named, direction.
    """
    standing = followed_objects(judge, clips[:, :, 0], prompts)
    moving = motion(clips).argmax(-1)
    first, directions, both = [], [], []
    for row, prompt in enumerate(prompts):
        for obj, stands in zip(parse_caption(prompt)[0], standing[row], strict=True):
            first.append(stands)
            if obj.direction:
                wanted = FIRST_DIRECTION + list(DIRECTIONS).index(obj.direction)
                directions.append(int(moving[row, list(PLACES).index(obj.place)]) == wanted)
                stands = stands and directions[-1]
            both.append(stands)
    # prompts that name no direction leave nothing to judge
    rates = {"first_frame": first, "motion": directions or [True], "all": both}
    return {name: float(np.mean(rate)) for name, rate in rates.items()}
