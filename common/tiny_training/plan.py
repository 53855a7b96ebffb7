"""What the training of every tiny pipeline shares: how much of everything, its command line, and what it draws from."""

import argparse
import hashlib
import os
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tiny_training import emoji, text
from tiny_training.emoji import EmojiSet
from tiny_training.sources import SceneSet, Source
from tiny_training.sprites import load_sprites

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny"
SIZE = 64  # pixels
NUM_FRAMES = 17
MAX_TEXT_LENGTH = 16
SEED = 2027
EVERYTHING, TAUGHT, JUDGED = 0, 1, 2  # added to the seed: of what the autoencoder sees, the transformer, the judge


@dataclass(frozen=True)
class Plan:
    """How much of everything a training takes. Every number is also a flag of train_tiny.py."""

    vae_examples: int
    vae_steps: int
    stills: int  # pictures that the transformer learns from; for video first frames of clips
    still_steps: int
    still_batch: int
    clips: int = 0
    clip_steps: int = 0
    clip_batch: int = 0
    distil_steps: int = 0
    judge_steps: int = 2_000
    judged: int = 200  # prompts that the finished pipeline is measured on
    sampling_steps: int = 28
    batch_factor: int = 1  # by which all batches are larger; a GPU takes 16 as fast as one


SMOKE = Plan(
    vae_examples=6,
    vae_steps=3,
    stills=8,
    still_steps=2,
    still_batch=2,
    clips=6,
    clip_steps=2,
    clip_batch=2,
    distil_steps=2,
    judge_steps=2,
    judged=2,
    sampling_steps=2,
)


@dataclass(frozen=True)
class Material:
    """What is trained on.

    Attributes:
        everything: for the autoencoder; subjects of subjects/unseen.txt are not in it.
        stills, clips: for the transformer; `clips` is None where a model makes pictures alone.
        unseen: of the subjects that nothing was trained on.
        empty: (1, MAX_TEXT_LENGTH), the tokens of no caption.
    """

    everything: Source
    stills: Source
    clips: Source | None
    unseen: Source
    tokenizer: PreTrainedTokenizerFast
    empty: Tensor

    def tokens(self, source: Source, count: int) -> Tensor:
        """Token ids (count, captions, MAX_TEXT_LENGTH) of the first examples of a source."""
        captions = [caption for index in range(count) for caption in source.captions(index)]
        return text.tokenize(self.tokenizer, captions, MAX_TEXT_LENGTH).unflatten(0, (count, -1))


def parse_arguments(
    description: str, folder: Path, plan: Plan, extra: dict[str, Any] | None = None
) -> tuple[argparse.Namespace, Plan]:
    """The command line of a train_tiny.py: folders, device, and the plan with what the flags change in it.

    Args:
        extra: keyword arguments of `add_argument` by flag, for a script's own flags.
    """
    work = CACHE / folder.name
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CACHE, help=f"folder with stills/ and clips/ (default: {CACHE})")
    parser.add_argument("--work", type=Path, default=work, help=f"checkpoints and latents (default: {work})")
    parser.add_argument("--out", type=Path, help=f"where the pipeline goes (default: {folder / 'tiny'})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--report", action="store_true", help="no training: the pipeline as it is now; --out is WORK/tiny"
    )
    parser.add_argument("--vae", type=Path, help="a finished autoencoder in place of training one: a folder's tiny/vae")
    parser.add_argument("--pack", type=Path, help="write latents and captions into this file, and train nothing")
    parser.add_argument("--packed", type=Path, help="train on such a file alone; small checkpoints go to --out")
    parser.add_argument("--minutes", type=float, help="with --packed: how long, in place of numbers of steps")
    parser.add_argument("--smoke", action="store_true", help="a step or two of every stage, of drawn scenes")
    for flag, settings in (extra or {}).items():
        parser.add_argument(flag, **settings)
    for field in fields(Plan):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"default: {getattr(plan, field.name)}")
    args = parser.parse_args()
    args.started = time.monotonic()
    args.pixels = args.work if args.smoke else args.data
    if args.minutes is not None and args.packed is None:
        parser.error("--minutes is for a training with --packed")
    aside = args.smoke or args.report or args.packed
    args.out = args.out or (args.work if aside else folder) / ("small" if args.packed else "tiny")
    given = {f.name: v for f in fields(Plan) if (v := getattr(args, f.name)) is not None}
    plan = replace(SMOKE if args.smoke else plan, **given)
    return args, as_far_as_trained(plan, args.work) if args.report else plan


def until(args: argparse.Namespace, share: float) -> float | None:
    """When a stage ends that takes `share` of what is left of --minutes, by time.monotonic(); None without them."""
    if args.minutes is None:
        return None
    now = time.monotonic()
    return now + share * max(0.0, args.started + 60 * args.minutes - now)


def latents_tag(args: argparse.Namespace, plan: Plan) -> str:
    """Tells in a file name which autoencoder made its latents: one that was given, or how long it was trained."""
    if args.vae is None:
        return str(plan.vae_steps)
    weights = b"".join(path.read_bytes() for path in sorted(args.vae.glob("*.safetensors")))
    return hashlib.sha256(weights).hexdigest()[:8]


def as_far_as_trained(plan: Plan, work: Path) -> Plan:
    """The plan with no more steps of the models than the checkpoints have."""
    names = {
        "vae_steps": ("vae", "vae-temporal"),
        "still_steps": ("flow-stills",),
        "clip_steps": ("flow-clips",),
        "distil_steps": ("distil",),
    }
    steps = {}
    for field, stages in names.items():
        paths = [path for name in stages if (path := work / f"{name}.pt").exists()]
        steps[field] = sum(torch.load(path, weights_only=True, mmap=True)["step"] for path in paths)
    return replace(plan, **steps)


def load_material(args: argparse.Namespace, moving: bool) -> Material:
    """Emoji from --data, or with --smoke drawn scenes. Raises FileNotFoundError where there are no emoji."""
    everything, stills, clips, unseen = _scenes(moving) if args.smoke else _emoji(args.data, moving)
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH, stills.vocabulary())
    empty = text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH)
    return Material(everything, stills, clips if moving else None, unseen, tokenizer, empty)


def _scenes(moving: bool) -> tuple[Source, Source, Source, Source]:
    clips = SceneSet(SEED, SIZE, NUM_FRAMES if moving else 1)
    return clips, SceneSet(SEED, SIZE), clips, clips


def _emoji(folder: Path, moving: bool) -> tuple[Source, Source, Source, Source]:
    frames, kind = (NUM_FRAMES, "clips") if moving else (1, "stills")
    sprites = load_sprites(folder, moving)
    looks, taught = sprites.looks(frames), emoji.load_subjects(kind)
    named = [subject for subject in emoji.load_subjects("unseen") if subject.code in looks]
    return (
        EmojiSet(f"all-{kind}", sprites, emoji.everything(sprites, frames), SEED + EVERYTHING, SIZE, frames),
        EmojiSet(kind, sprites, taught, SEED + TAUGHT, SIZE),
        EmojiSet(kind, sprites, taught, SEED + TAUGHT, SIZE, frames),
        EmojiSet(f"unseen-{kind}", sprites, named, SEED + JUDGED, SIZE, frames),
    )
