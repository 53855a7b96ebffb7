"""Trains the embedded tiny Wan pipeline: `python train_tiny.py`.

Stages: autoencoder, text encoder, flow matching with dropped captions on first frames and then on clips,
judges of prompt adherence. Each resumes after an interruption; what they leave in the work folder is not needed
once the pipeline is written to `tiny/`. `--smoke` runs a step or two of each.
"""

import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from tiny_parts import build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from tiny_training import clips, flow, text, video_stages, video_vae
from tiny_training.clips import MAX_TEXT_LENGTH, SEED, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-wan"
FLOW_SHIFT = 14.0  # of the sampler: harder to predict than the 8 to 12 that the official README advises for 1.3B
STILL_SHIFT = 1.2  # of the noise levels that first frames are trained at
CLIP_SHIFT = 1.0  # and clips: more noise makes places and motion, textures need the low levels that samplers end with
GUIDANCE_SCALE = 5.0
PLAN = Plan(
    num_clips=8_000,
    num_stills=24_000,
    vae_steps=4_000,
    text_steps=1_500,
    still_steps=8_000,
    still_batch=64,
    clip_steps=6_000,
    clip_batch=24,
    judge_steps=1_200,
    motion_steps=800,
)
# drifts show in whole clips only, since a chunk of frames follows a chunk; a middle block sees whole pictures
VAE_PHASES = (Crops(0.1, 1, 32, 32), Crops(0.3, 5, 32, 8), Crops(0.8, 17, 32, 3), Crops(1.0, 17, 64, 1))


class WanVelocity:
    """Calls the transformer as WanPipeline does, on latents (B, channels, frames, height, width)."""

    def __init__(self, encoder: UMT5EncoderModel, device: str):
        self.encoder = encoder.to(device).eval()

    def __call__(self, model: nn.Module, latents: Tensor, sigma: Tensor, tokens: Tensor, guidance: None) -> Tensor:
        with torch.no_grad():
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


def save_pipeline(autoencoder, encoder, tokenizer, transformer, folder: Path) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder, scheduler=scheduler, transformer=transformer
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
    video_stages.train_text_encoder(encoder, scenes, plan, args, masked=True)
    transformer = video_stages.train_transformer(
        video_stages.started(build_transformer(), args, "transformer"),
        WanVelocity(encoder, args.device),
        tuple(normalised(autoencoder, part) for part in latents),
        scenes,
        plan,
        args,
        levels=[partial(flow.logit_normal_levels, mean=math.log(shift)) for shift in (STILL_SHIFT, CLIP_SHIFT)],
    )
    save_pipeline(autoencoder, encoder, scenes.tokenizer, transformer, args.out)

    pipeline = WanPipeline.from_pretrained(args.out, dtype=torch.float32)
    sample = clips.sampler(pipeline, guidance_scale=GUIDANCE_SCALE, max_sequence_length=MAX_TEXT_LENGTH)
    clips.measure(sample, pipeline.vae, scenes, plan, args)


if __name__ == "__main__":
    main()
