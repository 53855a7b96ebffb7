"""What the training of every tiny video pipeline shares: its sizes, its captions, and how it is measured."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from tiny_training import data, judge, motion, sheet, text, video_vae

SIZE = 64  # pixels
NUM_FRAMES = 17
SEED = 2028
MAX_TEXT_LENGTH = 48
SHEET_FRAMES = [0, 4, 8, 12, 16]
SHEET_PROMPTS = 16
HALF_STEPS_PROMPTS = 8

# sample(prompts, num_inference_steps) -> clips (n, 3, F, H, W) in [0, 1], the same noise for the same prompts
Sample = Callable[[list[str], int], Tensor]


@dataclass(frozen=True)
class Plan:
    """How much of everything a training takes. Every number is also a flag of train_tiny.py."""

    num_clips: int  # moving scenes that are rendered whole
    num_stills: int  # moving scenes of which the first frame is rendered; the first ones are those of the clips
    vae_steps: int
    text_steps: int
    still_steps: int  # of the transformer, on first frames: a fifth of the tokens
    still_batch: int
    clip_steps: int  # of the transformer, on clips
    clip_batch: int
    judge_steps: int
    motion_steps: int
    sampling_steps: int = 50


SMOKE = Plan(
    num_clips=6,
    num_stills=8,
    vae_steps=3,
    text_steps=2,
    still_steps=2,
    still_batch=2,
    clip_steps=2,
    clip_batch=2,
    judge_steps=2,
    motion_steps=2,
    sampling_steps=2,
)


@dataclass(frozen=True)
class Scenes:
    """What is trained on: uint8 clips (n, F, H, W, 3), first frames (m, 1, H, W, 3), captions and their token ids.

    Attributes:
        tokens: (scenes, captions, MAX_TEXT_LENGTH); the first ones are those of the clips.
        empty: (1, MAX_TEXT_LENGTH), the tokens of no caption.
    """

    moving: np.ndarray
    stills: np.ndarray
    tokenizer: PreTrainedTokenizerFast
    captions: list[str]
    tokens: Tensor
    empty: Tensor
    held_out: list[str]


def parse_arguments(description: str, work: Path, out: Path, plan: Plan) -> tuple[argparse.Namespace, Plan]:
    """The command line of a train_tiny.py: folders, device, and the plan with what the flags change in it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=work, help=f"checkpoints and latents (default: {work})")
    parser.add_argument("--data", type=Path, help="rendered scenes, the same for all video pipelines (default: --work)")
    parser.add_argument("--out", type=Path, help=f"where the pipeline goes (default: {out})")
    parser.add_argument("--start-from", type=Path, help="a pipeline whose weights training goes on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a step or two of every stage, into WORK/tiny")
    for field in fields(Plan):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"default: {getattr(plan, field.name)}")
    args = parser.parse_args()
    args.data = args.data or args.work
    args.out = args.out or (args.work / "tiny" if args.smoke else out)
    given = {f.name: v for f in fields(Plan) if (v := getattr(args, f.name)) is not None}
    return args, replace(SMOKE if args.smoke else plan, **given)


def held_out_prompts(folder: Path) -> list[str]:
    """The prompts of prompts/held_out.txt."""
    return (folder / "prompts" / "held_out.txt").read_text(encoding="utf-8").splitlines()


def tokenized_captions(
    tokenizer: PreTrainedTokenizerFast, plan: Plan, held_out: Sequence[str]
) -> tuple[list[str], Tensor]:
    """All training captions (scenes * captions) and their token ids (scenes, captions, MAX_TEXT_LENGTH).

    Raises:
        SystemExit: a held-out prompt is among them.
    """
    scenes = max(plan.num_clips, plan.num_stills)
    captions = [c for i in range(scenes) for c in data.captions_for(i, SEED, moving=True)]
    if seen := sorted(set(held_out) & set(captions)):
        raise SystemExit(f"held-out prompt {seen[0]!r} is a training caption: take it out of prompts/held_out.txt")
    return captions, text.tokenize(tokenizer, captions, MAX_TEXT_LENGTH).unflatten(0, (scenes, -1))


def sampler(pipeline: DiffusionPipeline, batch_size: int = 8, **arguments: Any) -> Sample:
    """Samples from a video pipeline with its own `arguments`; the noise of a prompt depends on its number alone."""
    pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def sample(prompts: list[str], num_inference_steps: int) -> Tensor:
        parts = []
        for start in tqdm(range(0, len(prompts), batch_size), desc=f"sample, {num_inference_steps} steps"):
            batch = prompts[start : start + batch_size]
            frames = pipeline(
                batch,
                height=SIZE,
                width=SIZE,
                num_frames=NUM_FRAMES,
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
                output_type="pt",
                **arguments,
            ).frames
            parts.append(frames.transpose(1, 2))  # (n, F, 3, H, W) -> (n, 3, F, H, W)
        return torch.cat(parts).float()

    return sample


def measure(
    sample: Sample,
    autoencoder: torch.nn.Module,
    scenes: Scenes,
    plan: Plan,
    args: argparse.Namespace,
) -> None:
    """Write the contact sheet and training.json: adherence to held-out prompts, ceilings, autoencoder, hardness."""
    critics = (
        judge.train_judge(
            scenes.stills[:, 0], SEED, num_steps=plan.judge_steps, folder=args.work, device=args.device, moving=True
        ).cpu(),
        motion.train_motion_judge(
            scenes.moving, SEED, num_steps=plan.motion_steps, folder=args.work, device=args.device
        ).cpu(),
    )
    unseen, captions = _unseen_clips(max(plan.num_clips, plan.num_stills), 8 if args.smoke else 200)
    held_out = scenes.held_out[:2] if args.smoke else scenes.held_out
    samples = sample(held_out, plan.sampling_steps)
    sheet.clip_sheet(samples[:SHEET_PROMPTS], held_out[:SHEET_PROMPTS], SHEET_FRAMES, args.out / "contact_sheet.png")
    few = held_out[:HALF_STEPS_PROMPTS]
    half = sample(few, plan.sampling_steps // 2)
    report = {
        "adherence": motion.clip_adherence(*critics, samples, held_out),
        "adherence_of_rendered_scenes": motion.clip_adherence(*critics, _as_tensor(unseen), captions),
        "prompts": len(held_out),
        "half_steps_psnr": _psnr(half, samples[: len(few)]),
        "vae_psnr": video_vae.clip_psnr(autoencoder, unseen[:32]),
        "megabytes": round(sum(f.stat().st_size for f in args.out.rglob("*.safetensors")) / 1e6, 2),
        **{f.name: getattr(plan, f.name) for f in fields(Plan)},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def _unseen_clips(first: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Clips uint8 (count, F, H, W, 3) of scenes after the training's, with a caption each."""
    indices = range(first, first + count)
    pixels = np.stack([data.rendered_clip(i, SEED, SIZE, NUM_FRAMES) for i in indices])
    return pixels, [data.captions_for(i, SEED, moving=True)[0] for i in indices]


def _as_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (n, F, H, W, 3) -> (n, 3, F, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 255


def _psnr(clips: Tensor, reference: Tensor) -> float:
    """Mean over clips of the PSNR in dB."""
    errors = (clips - reference).square().mean((1, 2, 3, 4)).clamp(min=1e-12)
    return float((-10 * errors.log10()).mean())
