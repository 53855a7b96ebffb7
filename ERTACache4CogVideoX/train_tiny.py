"""Trains the embedded tiny CogVideoX pipeline: `python train_tiny.py --data DATA`.

It learns from animated Fluent emoji (art: Microsoft, MIT licence), which `npm pack @lobehub/fluent-emoji-anim-1@1.0.0`
and its like fetch; unpack the pictures into DATA/clips (tiny_training/sprites.py has the lines). Stages: autoencoder,
v-prediction with dropped captions on first frames and then on clips, together with the text encoder, judge. Each
resumes after an interruption, by the same command. `--report` shows what is there so far; `--smoke` runs a step or two
of each stage on drawn scenes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from tiny_parts import build_scheduler, build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tiny_training import flow, plan, text, video_stages
from tiny_training.lessons import Lessons
from tiny_training.plan import MAX_TEXT_LENGTH, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
GUIDANCE_SCALE = 6.0
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
# group norms see the whole of a picture, and in a clip of 17 frames a second chunk follows the first nine
VAE_PHASES = (Crops(0.35, 1, 64, 12), Crops(0.85, 17, 32, 3), Crops(1.0, 17, 64, 1))


class CogVideoXPrediction:
    """Calls the transformer as CogVideoXPipeline does, on latents (B, frames, channels, height, width)."""

    def __init__(self, parts: nn.ModuleDict, num_train_timesteps: int):
        self.encoder, self.num_train_timesteps = parts["sequence"], num_train_timesteps

    def __call__(self, model: nn.Module, latents: Tensor, level: Tensor, tokens: Tensor, guidance: None) -> Tensor:
        states = text.sequence_states(self.encoder, tokens, masked=False)
        timestep = flow.timesteps_of(level, self.num_train_timesteps)
        return model(hidden_states=latents, encoder_hidden_states=states, timestep=timestep, return_dict=False)[0]


def set_latent_scale(autoencoder: AutoencoderKLCogVideoX, latents: np.ndarray) -> None:
    """Write the factor that gives latents (n, C, f, h, w) unit power into the VAE's config."""
    power = torch.from_numpy(latents[:1000]).float().square().mean()
    autoencoder.register_to_config(scaling_factor=float(power.rsqrt()))


def normalised(autoencoder: AutoencoderKLCogVideoX, latents: np.ndarray) -> Tensor:
    """Latents as the transformer sees them, float16 (n, f, C, h, w)."""
    scale = autoencoder.config.scaling_factor
    return torch.stack([(torch.from_numpy(z).float() * scale).half().transpose(0, 1) for z in latents])


def save_pipeline(
    autoencoder: AutoencoderKLCogVideoX, parts: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=parts["sequence"],
        vae=autoencoder,
        transformer=parts["transformer"],
        scheduler=build_scheduler(),
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


def trained_transformer(lessons: Lessons, steps: Plan, args: argparse.Namespace) -> nn.ModuleDict:
    """Transformer and text encoder, trained on first frames and on clips."""
    encoder = build_text_encoder(lessons.vocabulary)
    parts = nn.ModuleDict({"transformer": build_transformer(), "sequence": encoder})
    alphas_cumprod = build_scheduler().alphas_cumprod
    video_stages.train_transformer(
        parts,
        CogVideoXPrediction(parts, len(alphas_cumprod)),
        lessons,
        steps,
        args,
        levels=flow.uniform_levels,
        path=flow.diffusion_path(alphas_cumprod),
    )
    return parts


MODEL = video_stages.VideoModel(
    video_stages.encoded_by(build_vae, VAE_PHASES),
    set_latent_scale,
    normalised,
    trained_transformer,
    save_pipeline,
    CogVideoXPipeline,
    {"guidance_scale": GUIDANCE_SCALE, "max_sequence_length": MAX_TEXT_LENGTH},
)

if __name__ == "__main__":
    given, steps = plan.parse_arguments(__doc__, FOLDER, PLAN)
    video_stages.train(MODEL, steps, given)
