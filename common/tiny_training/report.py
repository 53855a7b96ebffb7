"""How good a trained pipeline is: what its prompts give, and what that is worth beside the training's own pictures."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_training import judge, sheet
from tiny_training.plan import Material, Plan
from tiny_training.sources import FIRST_UNSEEN, Source, rendered

SHEET_PROMPTS = 24
SHEET_FRAMES = [0, 4, 8, 12, 16]
HALF_STEPS_PROMPTS = 8

# sample(prompts, num_inference_steps) -> (n, 3, F, H, W) in [0, 1], the same noise for the same prompts
Sample = Callable[[list[str], int], Tensor]


def measure(sample: Sample, autoencoder_psnr: float, material: Material, plan: Plan, args: argparse.Namespace) -> None:
    """Write contact_sheet.png and training.json into --out: adherence to held-out prompts and its ceiling, hardness."""
    source = material.clips or material.stills
    prompts, labels = map(list, zip(*source.held_out(plan.judged), strict=True))
    samples = sample(prompts, plan.sampling_steps)
    _write_sheet(samples[:SHEET_PROMPTS], prompts[:SHEET_PROMPTS], args.out / "contact_sheet.png")
    few = prompts[:HALF_STEPS_PROMPTS]
    real = unseen_examples(source, plan.judged)
    critic = _trained_judge(source, plan.clips if material.clips else plan.stills, plan, args)
    report: dict[str, float] = {
        "recognised": judge.recognised(critic, samples, labels),
        "recognised_of_data": judge.recognised(
            critic, as_tensor(real), [source.label(FIRST_UNSEEN + i) for i in range(plan.judged)]
        ),
        "prompts": len(prompts),
        "change": _change(samples),
        "change_of_data": _change(as_tensor(real)),
        "half_steps_psnr": _psnr(sample(few, plan.sampling_steps // 2), samples[: len(few)]),
        "vae_psnr": autoencoder_psnr,
        "megabytes": round(sum(f.stat().st_size for f in args.out.rglob("*.safetensors")) / 1e6, 2),
        **asdict(plan),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def unseen_examples(source: Source, count: int) -> np.ndarray:
    """uint8 (count, F, H, W, 3) of examples that nothing was trained on."""
    return np.stack([source.pixels(FIRST_UNSEEN + index) for index in range(count)])


def as_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (n, F, H, W, 3) -> (n, 3, F, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 255


def _trained_judge(source: Source, count: int, plan: Plan, args: argparse.Namespace) -> judge.Judge:
    pixels = rendered(source, count, args.pixels)
    return judge.train_judge(source, pixels, num_steps=plan.judge_steps, folder=args.work, device=args.device).cpu()


def _write_sheet(samples: Tensor, prompts: list[str], path: Path) -> None:
    if samples.shape[2] == 1:
        sheet.picture_sheet(samples[:, :, 0], prompts, path)
    else:
        sheet.clip_sheet(samples, prompts, SHEET_FRAMES, path)


def _change(clips: Tensor) -> float:
    """Mean absolute difference of the first frame and the last."""
    return float((clips[:, :, -1] - clips[:, :, 0]).abs().mean())


def _psnr(clips: Tensor, reference: Tensor) -> float:
    """Mean over clips of the PSNR in dB."""
    errors = (clips - reference).square().mean((1, 2, 3, 4)).clamp(min=1e-12)
    return float((-10 * errors.log10()).mean())
