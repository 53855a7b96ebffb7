"""Trains the embedded tiny Open-Sora pipeline: `python train_tiny.py --data DATA`.

It learns from animated Fluent emoji (art: Microsoft, MIT licence), which `npm pack @lobehub/fluent-emoji-anim-1@1.0.0`
and its like fetch; unpack the pictures into DATA/clips (tiny_training/sprites.py has the lines). Stages: the temporal
autoencoder (that of pictures is the tiny FLUX pipeline's), rectified flow with dropped captions on first frames and
then on clips, together with the text encoder, judge. Each resumes after an interruption, by the same command.
`--report` shows what is there so far; `--smoke` runs a step or two of each stage on drawn scenes.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from opensora12 import OpenSoraPipeline, OpenSoraVAE, RFlowScheduler, STDiT3
from opensora12.geometry import network_fps
from tiny_autoencoder import encoded_frames, encoded_latents, load_picture_part, train_temporal_part
from tiny_parts import LATENT_CHANNELS, Clips, build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny_training import flow, plan, text, video_stages
from tiny_training.lessons import Lessons
from tiny_training.plan import NUM_FRAMES, SIZE, Material, Plan
from tiny_training.sources import Source, rendered
from tiny_training.vae import finished_vae

FOLDER = Path(__file__).parent
GUIDANCE_SCALE = 7.0
# The time transform grows with the sides in pixels and the root of the latent frames, and would crowd a small clip's
# times near the data: a clip of 64 pixels and 5 latent frames is to have the times of 480 x 854 and 15, the default.
TRANSFORM_SCALE = math.sqrt(480 * 854 / SIZE**2 * 15 / 5)
GRID_SHIFT = math.sqrt(480 * 854 / 512**2 * 15)  # what the transform then is
PLAN = Plan(
    vae_examples=3_000,
    vae_steps=3_000,
    stills=24_000,
    still_steps=30_000,
    still_batch=32,
    clips=8_000,
    clip_steps=15_000,
    clip_batch=12,
    judged=100,
    sampling_steps=30,
)
FLAGS = {
    "--picture-vae": {
        "type": Path,
        "help": "folder of the tiny FLUX pipeline's autoencoder (default: ../flux/vae, from WORK)",
    }
}


class OpenSoraVelocity:
    """Calls the transformer as OpenSoraPipeline does, on latents (B, channels, frames, height, width)."""

    def __init__(self, parts: nn.ModuleDict, empty: Tensor, device: str):
        self.encoder = parts["sequence"]
        self.null = parts["transformer"].y_embedder.y_embedding.detach().clone().to(device)
        self.empty = empty.to(device)

    def __call__(self, model: nn.Module, latents: Tensor, level: Tensor, tokens: Tensor, guidance: None) -> Tensor:
        states = text.sequence_states(self.encoder, tokens, masked=True)
        dropped = (tokens == self.empty).all(dim=1)
        states = torch.where(dropped[:, None, None], self.null, states.float())
        # with guidance the null caption is cut to the prompt's tokens, so here it is as long as some other caption
        lengths = (tokens != self.encoder.config.pad_token_id).sum(dim=1)
        lengths = torch.where(dropped, lengths.roll(1), lengths)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        side = torch.full((len(latents),), float(SIZE), device=latents.device)
        frames = 1 if latents.shape[2] == 1 else NUM_FRAMES
        fps = torch.full_like(side, network_fps(frames))
        output = model(latents, level * 1000, states[:, None], mask=mask, fps=fps, height=side, width=side)
        return output[:, :LATENT_CHANNELS]  # the rest are variances, which the sampler does not use


def data_minus_noise(latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path with Open-Sora's sign of the velocity."""
    mixed, velocity = flow.straight_path(latents, noise, level)
    return mixed, -velocity


def set_latent_scale(autoencoder: OpenSoraVAE, latents: np.ndarray) -> None:
    """Write mean and standard deviation of each channel of latents (n, C, f, h, w) into the VAE."""
    sample = torch.from_numpy(latents[:1000]).float().transpose(0, 1).flatten(1)
    mean, std = sample.mean(1), sample.std(1)
    autoencoder.shift.copy_(mean.view(1, -1, 1, 1, 1))
    autoencoder.scale.copy_(std.view(1, -1, 1, 1, 1))
    autoencoder.register_to_config(shift=mean.tolist(), scale=std.tolist())


def normalised(autoencoder: OpenSoraVAE, latents: np.ndarray) -> Tensor:
    """Latents as the transformer sees them, float16 (n, C, f, h, w)."""
    shift, scale = autoencoder.shift[0].cpu(), autoencoder.scale[0].cpu()
    return torch.stack([((torch.from_numpy(z).float() - shift) / scale).half() for z in latents])


def save_pipeline(
    autoencoder: OpenSoraVAE, parts: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    plain = STDiT3.from_config(parts["transformer"].config)
    plain.load_state_dict(parts["transformer"].state_dict())
    pipeline = OpenSoraPipeline(
        transformer=plain,
        vae=autoencoder,
        scheduler=RFlowScheduler(transform_scale=TRANSFORM_SCALE),
        text_encoder=parts["sequence"],
        tokenizer=tokenizer,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


def trained_autoencoder(
    material: Material, steps: Plan, args: argparse.Namespace
) -> tuple[OpenSoraVAE, np.ndarray, np.ndarray]:
    """The autoencoder, and the latents of first frames and of clips."""
    autoencoder = build_vae()
    if args.vae:
        autoencoder = finished_vae(autoencoder, args.vae, 1, 3, NUM_FRAMES, SIZE, SIZE, seen_as=Clips)
    autoencoder.to(args.device)
    if not args.vae and not args.smoke:
        load_picture_part(autoencoder, args.picture_vae or args.work.parent / "flux" / "vae")

    def frames(source: Source, count: int, name: str) -> np.ndarray:
        pixels = rendered(source, count, args.pixels)
        made_by = f"-{plan.latents_tag(args, steps)}" if args.vae else ""
        path = args.work / f"frames-{name}-{count}{made_by}.npy"
        return encoded_frames(autoencoder, pixels, path, args.device, 8)

    assert material.clips is not None
    if not args.vae:
        train_temporal_part(
            autoencoder,
            frames(material.everything, steps.vae_examples, "everything"),
            num_steps=steps.vae_steps,
            batch_factor=steps.batch_factor,
            folder=args.work,
            device=args.device,
        )
    stills, clips = frames(material.stills, steps.stills, "stills"), frames(material.clips, steps.clips, "clips")
    return autoencoder, *(encoded_latents(autoencoder, part, args.device) for part in (stills, clips))


def trained_transformer(lessons: Lessons, steps: Plan, args: argparse.Namespace) -> nn.ModuleDict:
    """Transformer and text encoder, trained on first frames and on clips."""
    encoder = build_text_encoder(lessons.vocabulary)
    parts = nn.ModuleDict({"transformer": build_transformer(), "sequence": encoder})
    velocity = OpenSoraVelocity(parts, lessons.empty, args.device)
    video_stages.train_transformer(parts, velocity, lessons, steps, args, path=data_minus_noise)
    return parts


# no score is appended to a prompt, since the tiny tokenizer does not know the words
SAMPLING = {"guidance_scale": GUIDANCE_SCALE, "aesthetic_score": None}
MODEL = video_stages.VideoModel(
    trained_autoencoder,
    set_latent_scale,
    normalised,
    trained_transformer,
    save_pipeline,
    OpenSoraPipeline,
    SAMPLING,
    seen_as=Clips,
)

if __name__ == "__main__":
    given, steps = plan.parse_arguments(__doc__, FOLDER, PLAN, FLAGS)
    video_stages.train(MODEL, steps, given)
