"""Trains the embedded tiny CogVideoX pipeline: `python train_tiny.py` (about an hour and a quarter on two cores).

Stages: autoencoder, text encoder, v-prediction with dropped captions on first frames and then on clips, judges
of prompt adherence. Each resumes after an interruption; what they leave in the work folder is not needed once
the pipeline is written to `tiny/`. `--smoke` runs a step or two of each.
"""

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tiny_training import clips, data, flow, text, video_vae
from tiny_training.clips import MAX_TEXT_LENGTH, NUM_FRAMES, SEED, SIZE, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-cogvideox"
LATENT_CHANNELS = 16
VAE_FACTOR = 4  # pixels per latent, both ways; the textures of the scenes have periods of 4 to 6 pixels
TEXT_WIDTH = 96
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
VAE_PHASES = (Crops(0.25, 1, 32, 32), Crops(0.75, 9, 32, 6), Crops(0.88, 17, 32, 3), Crops(1.0, 17, 64, 1))


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The noise schedule of CogVideoX-2B: v-prediction, zero signal at the last timestep, shifted towards noise."""
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
    )


def build_vae() -> AutoencoderKLCogVideoX:
    levels = 3
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        block_out_channels=(24, 48, 48),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=4,
        sample_height=SIZE,
        sample_width=SIZE,
        scaling_factor=1.0,
    )


def build_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(
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
    return T5EncoderModel(config)


def build_transformer() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=6,
        sample_width=SIZE // VAE_FACTOR,
        sample_height=SIZE // VAE_FACTOR,
        sample_frames=NUM_FRAMES,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=MAX_TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )


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
    )

    alphas_cumprod = build_scheduler().alphas_cumprod
    prediction = CogVideoXPrediction(encoder, len(alphas_cumprod), args.device)
    empty = text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH)
    transformer = build_transformer()
    for name, latents, num_steps, batch_size, rate in (
        ("stills", still_latents, plan.still_steps, plan.still_batch, 2e-3),
        ("clips", clip_latents, plan.clip_steps, plan.clip_batch, 1.5e-3),
    ):
        latents = normalised(autoencoder, latents)
        transformer = flow.train_flow(
            transformer,
            prediction,
            flow.Batches(latents, tokens[: len(latents)], empty, batch_size, args.device, flow.uniform_levels),
            num_steps=num_steps,
            learning_rate=rate,
            folder=args.work,
            name=f"flow-{name}",
            path=flow.diffusion_path(alphas_cumprod),
            compiled=not args.smoke,
        )
    save_pipeline(autoencoder, encoder, tokenizer, transformer, args.out)

    pipeline = CogVideoXPipeline.from_pretrained(args.out, torch_dtype=torch.float32)
    clips.measure(clips.sampler(pipeline, GUIDANCE_SCALE), pipeline.vae, stills, moving, plan, args, held_out)


if __name__ == "__main__":
    main()
