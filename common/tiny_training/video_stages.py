"""The stages that the training of every tiny video pipeline goes through; a train_tiny.py names its own parts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from tiny_training import clips, data, flow, text, video_vae
from tiny_training.clips import MAX_TEXT_LENGTH, NUM_FRAMES, SEED, SIZE, Plan, Scenes

TEXT_BATCH, TEXT_LEARNING_RATE = 64, 2e-3
STILL_LEARNING_RATE, CLIP_LEARNING_RATE = 2e-3, 1.5e-3


def load_scenes(folder: Path, plan: Plan, args: argparse.Namespace) -> Scenes:
    """Render what is not rendered yet. Raises SystemExit where a held-out prompt is a training caption."""
    held_out = clips.held_out_prompts(folder)
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH)
    captions, tokens = clips.tokenized_captions(tokenizer, plan, held_out)
    return Scenes(
        moving=data.rendered_clips(plan.num_clips, SEED, SIZE, NUM_FRAMES, args.data),
        stills=data.rendered_clips(plan.num_stills, SEED, SIZE, 1, args.data),
        tokenizer=tokenizer,
        captions=captions,
        tokens=tokens,
        empty=text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH),
        held_out=held_out,
    )


def started(module: nn.Module, args: argparse.Namespace, name: str) -> nn.Module:
    """The module with the weights of the part `name` of the pipeline that training goes on from, if one is given."""
    if args.start_from is not None:
        trained = type(module).from_pretrained(args.start_from / name)  # type: ignore[operator]
        module.load_state_dict(trained.state_dict())
    return module


def encoded_scenes(
    autoencoder: nn.Module, scenes: Scenes, plan: Plan, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of first frames and of clips, float16 (n, C, f, h, w), kept in the work folder; not normalised."""

    def encode(pixels: np.ndarray, name: str, batch_size: int) -> np.ndarray:
        # another length of training is another autoencoder, with other latents
        path = args.work / f"latents-{name}-{plan.vae_steps}.npy"
        return video_vae.encoded_clips(autoencoder, pixels, path, args.device, batch_size)

    return encode(scenes.stills, "stills", 64), encode(scenes.moving, "clips", 8)


def train_text_encoder(
    encoder: nn.Module, scenes: Scenes, plan: Plan, args: argparse.Namespace, masked: bool
) -> nn.Module:
    """Train in place and return; `masked` hides the padding, as the pipeline will."""
    text.train_text_encoders(
        encoder,
        None,
        scenes.tokens.flatten(0, 1),
        scenes.captions,
        num_steps=plan.text_steps,
        batch_size=TEXT_BATCH,
        learning_rate=TEXT_LEARNING_RATE,
        folder=args.work,
        device=args.device,
        masked=masked,
    )
    return encoder


def train_transformer(
    transformer: nn.Module,
    ask: flow.Velocity,
    latents: tuple[Tensor, Tensor],
    scenes: Scenes,
    plan: Plan,
    args: argparse.Namespace,
    *,
    levels: Sequence[flow.Levels],
    path: flow.NoisePath = flow.straight_path,
) -> nn.Module:
    """Train on first frames, which have a fifth of the tokens, then on clips.

    Args:
        latents: of first frames and of clips, as the transformer sees them, float16.
        levels: the noise levels that are trained at, of first frames and of clips.
    """
    stages = (
        ("stills", plan.still_steps, plan.still_batch, STILL_LEARNING_RATE),
        ("clips", plan.clip_steps, plan.clip_batch, CLIP_LEARNING_RATE),
    )
    for (name, num_steps, batch_size, rate), part, drawn in zip(stages, latents, levels, strict=True):
        tokens = scenes.tokens[: len(part)]
        transformer = flow.train_flow(
            transformer,
            ask,
            flow.Batches(part, tokens, scenes.empty, batch_size, args.device, drawn),
            num_steps=num_steps,
            learning_rate=rate,
            folder=args.work,
            name=f"flow-{name}",
            path=path,
            compiled=not args.smoke,
        )
    return transformer
