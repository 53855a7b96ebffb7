"""Trains the embedded tiny CogVideoX pipeline: `python train_tiny.py`.

Stages: autoencoder, text encoder, v-prediction with dropped captions on first frames and then on clips, judges
of prompt adherence. Each resumes after an interruption; what they leave in the work folder is not needed once
the pipeline is written to `tiny/`. `--smoke` runs a step or two of each.
"""

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from tiny_parts import build_scheduler, build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from transformers import T5EncoderModel

from tiny_training import clips, flow, text, video_stages, video_vae
from tiny_training.clips import MAX_TEXT_LENGTH, SEED, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-cogvideox"
GUIDANCE_SCALE = 6.0
PLAN = Plan(
    num_clips=8_000,
    num_stills=24_000,
    vae_steps=3_600,
    text_steps=1_500,
    still_steps=8_000,
    still_batch=64,
    clip_steps=6_000,
    clip_batch=24,
    judge_steps=1_200,
    motion_steps=800,
)
# group norms see the whole of a picture, and in a clip of 17 frames a second chunk follows the first nine
VAE_PHASES = (Crops(0.25, 1, 32, 32), Crops(0.75, 9, 32, 6), Crops(0.95, 17, 32, 3), Crops(1.0, 17, 64, 1))


class CogVideoXPrediction:
    """Calls the transformer as CogVideoXPipeline does, on latents (B, frames, channels, height, width)."""

    def __init__(self, encoder: T5EncoderModel, num_train_timesteps: int, device: str):
        self.encoder = encoder.to(device).eval()
        self.num_train_timesteps = num_train_timesteps

    def __call__(self, model: nn.Module, latents: Tensor, level: Tensor, tokens: Tensor, guidance: None) -> Tensor:
        with torch.no_grad():
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


def save_pipeline(autoencoder, encoder, tokenizer, transformer, folder: Path) -> None:
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


def main() -> None:
    args, plan = clips.parse_arguments(__doc__, WORK, FOLDER / "tiny", PLAN)
    torch.manual_seed(SEED)
    scenes = video_stages.load_scenes(FOLDER, plan, args)
    autoencoder = video_vae.train_video_vae(
        video_stages.started(build_vae(), args, "vae"),
        scenes.moving,
        VAE_PHASES,
        num_steps=plan.vae_steps,
        learning_rate=4e-3,
        folder=args.work,
        device=args.device,
    )
    latents = video_stages.encoded_scenes(autoencoder, scenes, plan, args)
    set_latent_scale(autoencoder, latents[1])
    encoder = video_stages.started(build_text_encoder(len(scenes.tokenizer)), args, "text_encoder")
    video_stages.train_text_encoder(encoder, scenes, plan, args, masked=False)
    alphas_cumprod = build_scheduler().alphas_cumprod
    transformer = video_stages.train_transformer(
        video_stages.started(build_transformer(), args, "transformer"),
        CogVideoXPrediction(encoder, len(alphas_cumprod), args.device),
        tuple(normalised(autoencoder, part) for part in latents),
        scenes,
        plan,
        args,
        levels=[flow.uniform_levels, flow.uniform_levels],
        path=flow.diffusion_path(alphas_cumprod),
    )
    save_pipeline(autoencoder, encoder, scenes.tokenizer, transformer, args.out)

    pipeline = CogVideoXPipeline.from_pretrained(args.out, dtype=torch.float32)
    sample = clips.sampler(pipeline, guidance_scale=GUIDANCE_SCALE, max_sequence_length=MAX_TEXT_LENGTH)
    clips.measure(sample, pipeline.vae, scenes, plan, args)


if __name__ == "__main__":
    main()
