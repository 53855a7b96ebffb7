"""Trains the embedded tiny Wan pipeline: `python train_tiny.py` (about an hour and a quarter on two cores).

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
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from tiny_training import clips, data, flow, text, video_vae
from tiny_training.clips import MAX_TEXT_LENGTH, NUM_FRAMES, SEED, SIZE, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-wan"
LATENT_CHANNELS = 16
VAE_FACTOR = 4  # pixels per latent, both ways; the textures of the scenes have periods of 4 to 6 pixels
TEXT_WIDTH = 96
FLOW_SHIFT = 5.0  # of the sampler, as for the real model
TRAINING_SHIFT = 3.0  # of the noise levels trained at: 320 tokens of five frames drown later than one picture's 64
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
# the attention of the middle block sees a whole picture, and from the third latent on a chunk follows a chunk
VAE_PHASES = (Crops(0.25, 1, 32, 32), Crops(0.8, 5, 32, 12), Crops(0.9, 9, 32, 6), Crops(1.0, 9, 64, 2))


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=VAE_FACTOR,
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


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
    held_out = clips.held_out_prompts(FOLDER)
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH)
    captions, tokens = clips.tokenized_captions(tokenizer, plan, held_out)
    moving = data.rendered_clips(plan.num_clips, SEED, SIZE, NUM_FRAMES, args.data)
    stills = data.rendered_clips(plan.num_stills, SEED, SIZE, 1, args.data)

    autoencoder = video_vae.train_video_vae(
        build_vae(),
        moving,
        VAE_PHASES,
        num_steps=plan.vae_steps,
        learning_rate=4e-3,
        folder=args.work,
        device=args.device,
    )
    still_latents = video_vae.encoded_clips(
        autoencoder, stills, args.work / f"latents-stills-{plan.vae_steps}.npy", args.device, 64
    )
    clip_latents = video_vae.encoded_clips(
        autoencoder, moving, args.work / f"latents-clips-{plan.vae_steps}.npy", args.device
    )
    set_latent_scale(autoencoder, clip_latents)

    encoder = build_text_encoder(len(tokenizer))
    text.train_text_encoders(
        encoder,
        None,
        tokens.flatten(0, 1),
        captions,
        num_steps=plan.text_steps,
        batch_size=64,
        learning_rate=2e-3,
        folder=args.work,
        device=args.device,
        masked=True,
    )

    velocity = WanVelocity(encoder, args.device)
    empty = text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH)
    transformer = build_transformer()
    for name, latents, num_steps, batch_size, rate, shift in (
        ("stills", still_latents, plan.still_steps, plan.still_batch, 2e-3, 1.2),
        ("clips", clip_latents, plan.clip_steps, plan.clip_batch, 1.5e-3, TRAINING_SHIFT),
    ):
        levels = partial(flow.logit_normal_levels, mean=math.log(shift))
        latents = normalised(autoencoder, latents)
        transformer = flow.train_flow(
            transformer,
            velocity,
            flow.Batches(latents, tokens[: len(latents)], empty, batch_size, args.device, levels),
            num_steps=num_steps,
            learning_rate=rate,
            folder=args.work,
            name=f"flow-{name}",
            compiled=not args.smoke,
        )
    save_pipeline(autoencoder, encoder, tokenizer, transformer, args.out)

    pipeline = WanPipeline.from_pretrained(args.out, torch_dtype=torch.float32)
    clips.measure(clips.sampler(pipeline, GUIDANCE_SCALE), pipeline.vae, stills, moving, plan, args, held_out)


if __name__ == "__main__":
    main()
