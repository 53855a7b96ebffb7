"""Trains the embedded tiny Wan pipeline: `python train_tiny.py --data DATA`.

It learns from animated Fluent emoji (art: Microsoft, MIT licence), which `npm pack @lobehub/fluent-emoji-anim-1@1.0.0`
and its like fetch; unpack the pictures into DATA/clips (tiny_training/sprites.py has the lines). Stages: autoencoder,
flow matching with dropped captions on first frames and then on clips, together with the text encoder, judge. Each
resumes after an interruption, by the same command. `--report` shows what is there so far; `--smoke` runs a step or two
of each stage on drawn scenes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from tiny_parts import build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny_training import plan, text, video_stages
from tiny_training.lessons import Lessons
from tiny_training.plan import MAX_TEXT_LENGTH, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
FLOW_SHIFT = 5.0  # of the sampler, as config.py says for the real model
GUIDANCE_SCALE = 5.0
PLAN = Plan(
    vae_examples=3_000,
    vae_steps=4_000,
    stills=24_000,
    still_steps=30_000,
    still_batch=32,
    clips=8_000,
    clip_steps=15_000,
    clip_batch=12,
    judged=100,
    sampling_steps=50,
)
VAE_PHASES = (Crops(0.35, 1, 64, 16), Crops(0.85, 17, 32, 4), Crops(1.0, 17, 64, 1))


class WanVelocity:
    """Calls the transformer as WanPipeline does, on latents (B, channels, frames, height, width)."""

    def __init__(self, parts: nn.ModuleDict):
        self.encoder = parts["sequence"]

    def __call__(self, model: nn.Module, latents: Tensor, sigma: Tensor, tokens: Tensor, guidance: None) -> Tensor:
        states = text.sequence_states(self.encoder, tokens, masked=True)
        return model(hidden_states=latents, timestep=sigma * 1000, encoder_hidden_states=states, return_dict=False)[0]


def set_latent_scale(autoencoder: AutoencoderKLWan, latents: np.ndarray) -> None:
    """Write mean and standard deviation of each channel of latents (n, C, f, h, w) into the VAE's config."""
    sample = torch.from_numpy(latents[:1000]).float().transpose(0, 1).flatten(1)
    autoencoder.register_to_config(latents_mean=sample.mean(1).tolist(), latents_std=sample.std(1).tolist())


def normalised(autoencoder: AutoencoderKLWan, latents: np.ndarray) -> Tensor:
    """Latents as the transformer sees them, float16 (n, C, f, h, w)."""
    mean = torch.tensor(autoencoder.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(autoencoder.config.latents_std).view(-1, 1, 1, 1)
    return torch.stack([((torch.from_numpy(z).float() - mean) / std).half() for z in latents])


def save_pipeline(
    autoencoder: AutoencoderKLWan, parts: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts["sequence"],
        vae=autoencoder,
        scheduler=scheduler,
        transformer=parts["transformer"],
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


def trained_transformer(lessons: Lessons, steps: Plan, args: argparse.Namespace) -> nn.ModuleDict:
    """Transformer and text encoder, trained on first frames and on clips."""
    encoder = build_text_encoder(lessons.vocabulary)
    parts = nn.ModuleDict({"transformer": build_transformer(), "sequence": encoder})
    video_stages.train_transformer(parts, WanVelocity(parts), lessons, steps, args)
    return parts


MODEL = video_stages.VideoModel(
    video_stages.encoded_by(build_vae, VAE_PHASES),
    set_latent_scale,
    normalised,
    trained_transformer,
    save_pipeline,
    WanPipeline,
    {"guidance_scale": GUIDANCE_SCALE, "max_sequence_length": MAX_TEXT_LENGTH},
)

if __name__ == "__main__":
    given, steps = plan.parse_arguments(__doc__, FOLDER, PLAN)
    video_stages.train(MODEL, steps, given)
