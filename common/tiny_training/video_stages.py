"""The stages that the training of every tiny video pipeline goes through; a train_tiny.py names its own parts."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from tiny_training import flow, report, video_vae
from tiny_training.lessons import Lessons
from tiny_training.loop import small_checkpoints
from tiny_training.plan import NUM_FRAMES, SEED, SIZE, Material, Plan, latents_tag, load_material, until
from tiny_training.sources import Source, rendered
from tiny_training.vae import finished_vae
from tiny_training.video_vae import Crops

STILL_LEARNING_RATE, CLIP_LEARNING_RATE = 2e-3, 1e-3
STILLS_SHARE = 0.4  # of the time, where that is given
ENCODE_BATCH = 8
UNSEEN_CLIPS = 32

Encoded = tuple[nn.Module, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class VideoModel:
    """What is a pipeline's own in its training.

    Attributes:
        autoencoder: the trained one, with latents of first frames and of clips, float16 (n, C, f, h, w).
        set_latent_scale: writes the scale of latents (n, C, f, h, w) into the autoencoder.
        normalised: latents as the transformer sees them, float16.
        transformer: the trained one, with its text encoder.
        save: writes the pipeline into a folder.
        pipeline: its class.
        sampling: arguments of its calls.
        seen_as: what encodes and decodes whole clips by the autoencoder.
    """

    autoencoder: Callable[[Material, Plan, argparse.Namespace], Encoded]
    set_latent_scale: Callable[[Any, np.ndarray], None]
    normalised: Callable[[Any, np.ndarray], Tensor]
    transformer: Callable[[Lessons, Plan, argparse.Namespace], nn.ModuleDict]
    save: Callable[[Any, nn.ModuleDict, PreTrainedTokenizerFast, Path], None]
    pipeline: type[DiffusionPipeline]
    sampling: dict[str, Any]
    seen_as: Callable[[Any], nn.Module] = lambda autoencoder: autoencoder


def train(model: VideoModel, steps: Plan, args: argparse.Namespace) -> None:
    """Go through all stages, each from where it was left."""
    torch.manual_seed(SEED)
    if args.packed:
        with small_checkpoints(args.work, args.out):
            model.transformer(Lessons.read(args.packed), steps, args)
        return
    material = load_material(args, moving=True)
    autoencoder, *latents = model.autoencoder(material, steps, args)
    if not args.vae:
        model.set_latent_scale(autoencoder, latents[1])
    stills, clips = (model.normalised(autoencoder, part) for part in latents)
    lessons = Lessons.of(material, {"stills": stills, "clips": clips})
    if args.pack:
        lessons.write(args.pack)
        return
    found = fidelity(model.seen_as(autoencoder), material, args)
    parts = model.transformer(lessons, steps, args)
    model.save(autoencoder, parts.eval(), material.tokenizer, args.out)
    pipeline = model.pipeline.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    report.measure(sampler(pipeline, **model.sampling), found, material, steps, args)


def encoded_by(build: Callable[[], nn.Module], phases: tuple[Crops, ...]) -> Callable[..., Encoded]:
    """An autoencoder that is trained in phases, with its latents."""

    def made(material: Material, plan: Plan, args: argparse.Namespace) -> Encoded:
        autoencoder = trained_autoencoder(build(), phases, material, plan, args)
        return autoencoder, *encoded_examples(autoencoder, material, plan, args)

    return made


def trained_autoencoder(
    autoencoder: nn.Module, phases: tuple[Crops, ...], material: Material, plan: Plan, args: argparse.Namespace
) -> nn.Module:
    """The autoencoder, trained in place on everything that moves; or a finished one, where it is given."""
    if args.vae:
        return finished_vae(autoencoder, args.vae, 1, 3, NUM_FRAMES, SIZE, SIZE).to(args.device)
    pixels = rendered(material.everything, plan.vae_examples, args.pixels)
    return video_vae.train_video_vae(
        autoencoder,
        pixels,
        [replace(crops, count=crops.count * plan.batch_factor) for crops in phases],
        num_steps=plan.vae_steps,
        learning_rate=4e-3,
        folder=args.work,
        device=args.device,
    )


def encoded_examples(
    autoencoder: nn.Module, material: Material, plan: Plan, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of first frames and of clips, float16 (n, C, f, h, w), kept in the work folder; not normalised."""

    def encode(source: Source, count: int) -> np.ndarray:
        pixels = rendered(source, count, args.pixels)
        # another length of training is another autoencoder, with other latents
        path = args.work / f"latents-{source.key}-{count}-{latents_tag(args, plan)}.npy"
        return video_vae.encoded_clips(autoencoder, pixels, path, args.device, ENCODE_BATCH)

    assert material.clips is not None
    return encode(material.stills, plan.stills), encode(material.clips, plan.clips)


def fidelity(autoencoder: nn.Module, material: Material, args: argparse.Namespace) -> float:
    """Mean PSNR in dB of clips of subjects that nothing was trained on, after encoding and decoding."""
    clips = [material.unseen.pixels(index) for index in range(2 if args.smoke else UNSEEN_CLIPS)]
    return video_vae.clip_psnr(autoencoder, np.stack(clips), args.device)


def train_transformer(
    parts: nn.ModuleDict,
    ask: flow.Velocity,
    lessons: Lessons,
    plan: Plan,
    args: argparse.Namespace,
    *,
    levels: flow.Levels = flow.logit_normal_levels,
    path: flow.NoisePath = flow.straight_path,
) -> None:
    """Train transformer and text encoder in place, on first frames, which have a fifth of the tokens, then on clips.

    Args:
        levels: the noise levels that are trained at.
    """
    stages = (
        ("stills", plan.still_steps, plan.still_batch, STILL_LEARNING_RATE, STILLS_SHARE),
        ("clips", plan.clip_steps, plan.clip_batch, CLIP_LEARNING_RATE, 1.0),
    )
    for name, num_steps, batch_size, rate, share in stages:
        latents, tokens = lessons.latents[name], lessons.tokens[name]
        flow.train_flow(
            parts,
            ask,
            flow.Batches(latents, tokens, lessons.empty, batch_size * plan.batch_factor, args.device, levels),
            num_steps=num_steps,
            learning_rate=rate,
            folder=args.work,
            name=f"flow-{name}",
            path=path,
            until=until(args, share),
        )


def sampler(pipeline: DiffusionPipeline, batch_size: int = 8, **arguments: Any) -> report.Sample:
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
        return torch.cat(parts).float().cpu()

    return sample
