"""Trains the embedded tiny Open-Sora pipeline: `python train_tiny.py` (an hour or two on two cores).

Stages: the autoencoder of pictures, then with the temporal one behind it, text encoder, rectified flow with dropped
captions on first frames and then on clips, judges of prompt adherence. Each resumes after an interruption; what
they leave in the work folder is not needed once the pipeline is written to `tiny/`. `--smoke` runs a step or two of
each.
"""

import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from opensora12 import OpenSoraPipeline, OpenSoraVAE, RFlowScheduler, STDiT3
from opensora12.geometry import network_fps
from tiny_parts import LATENT_CHANNELS, Clips, build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from tqdm import tqdm
from transformers import T5EncoderModel

from tiny_training import clips, data, flow, text, vae, video_vae
from tiny_training.clips import MAX_TEXT_LENGTH, NUM_FRAMES, SEED, SIZE, Plan
from tiny_training.video_vae import Crops

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-opensora"
GUIDANCE_SCALE = 7.0
# The time transform measures against pictures of 512 pixels, and would crowd a small clip's times near the data:
# here a picture of 64 pixels is what one of 512 is to the real model.
TRANSFORM_SCALE = 512 / SIZE
CLIP_SHIFT = math.sqrt(5)  # what the transform then makes of a clip's five latent frames; a picture's times stay
PLAN = Plan(
    num_clips=8_000,
    num_stills=24_000,
    vae_steps=3_600,
    text_steps=1_500,
    still_steps=8_000,
    still_batch=64,
    clip_steps=4_500,
    clip_batch=24,
    judge_steps=1_200,
    motion_steps=800,
    sampling_steps=30,
)
PICTURE_SHARE = 0.5  # steps of the picture autoencoder alone, as a share of those of both together
# group norms see the whole of a chunk, and a chunk is a clip
VAE_PHASES = (Crops(0.15, 1, 32, 24), Crops(0.8, 17, 32, 4), Crops(1.0, 17, 64, 1))


class OpenSoraVelocity:
    """Calls the transformer as OpenSoraPipeline does, on latents (B, channels, frames, height, width)."""

    def __init__(self, encoder: T5EncoderModel, transformer: STDiT3, empty: Tensor, device: str):
        self.encoder = encoder.to(device).eval()
        self.null = transformer.y_embedder.y_embedding.detach().clone().to(device)
        self.empty = empty.to(device)

    def __call__(self, model: nn.Module, latents: Tensor, level: Tensor, tokens: Tensor, guidance: None) -> Tensor:
        with torch.no_grad():
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


def save_pipeline(autoencoder, encoder, tokenizer, transformer, folder: Path) -> None:
    plain = STDiT3.from_config(transformer.config)
    plain.load_state_dict(transformer.state_dict())
    pipeline = OpenSoraPipeline(
        transformer=plain,
        vae=autoencoder,
        scheduler=RFlowScheduler(transform_scale=TRANSFORM_SCALE),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


def sampler(pipeline: OpenSoraPipeline, batch_size: int = 8) -> clips.Sample:
    """Samples from the pipeline; the noise of a prompt depends on its number alone."""
    pipeline.set_progress_bar_config(disable=True)

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
                guidance_scale=GUIDANCE_SCALE,
                aesthetic_score=None,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
                output_type="pt",
            ).frames
            parts.append(frames.transpose(1, 2))  # (n, F, 3, H, W) -> (n, 3, F, H, W)
        return torch.cat(parts).float()

    return sample


def train_autoencoder(stills: np.ndarray, moving: np.ndarray, plan: Plan, args) -> Clips:
    """The picture autoencoder on first frames, then both together on clips."""
    autoencoder = build_vae()
    vae.train_vae(
        autoencoder.spatial_vae.module,
        stills[:, 0],
        LATENT_CHANNELS,
        autoencoder.spatial_factor,
        num_steps=math.ceil(PICTURE_SHARE * plan.vae_steps),
        batch_size=32,
        crop=32,
        learning_rate=2e-3,
        folder=args.work / "pictures",
        device=args.device,
    )
    return video_vae.train_video_vae(
        Clips(autoencoder),
        moving,
        VAE_PHASES,
        num_steps=plan.vae_steps,
        learning_rate=3e-3,
        folder=args.work,
        device=args.device,
    )


def main() -> None:
    args, plan = clips.parse_arguments(__doc__, WORK, FOLDER / "tiny", PLAN)
    torch.manual_seed(SEED)
    held_out = clips.held_out_prompts(FOLDER)
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH)
    captions, tokens = clips.tokenized_captions(tokenizer, plan, held_out)
    moving = data.rendered_clips(plan.num_clips, SEED, SIZE, NUM_FRAMES, args.data)
    stills = data.rendered_clips(plan.num_stills, SEED, SIZE, 1, args.data)

    clip_autoencoder = train_autoencoder(stills, moving, plan, args)
    autoencoder = clip_autoencoder.autoencoder
    encode = partial(video_vae.encoded_clips, clip_autoencoder, device=args.device)
    still_latents = encode(stills, args.work / "latents-stills.npy", batch_size=64)
    clip_latents = encode(moving, args.work / "latents-clips.npy")
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

    empty = text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH)
    transformer = build_transformer()
    velocity = OpenSoraVelocity(encoder, transformer, empty, args.device)
    for name, latents, num_steps, batch_size, rate, shift in (
        ("stills", still_latents, plan.still_steps, plan.still_batch, 2e-3, 1.2),
        ("clips", clip_latents, plan.clip_steps, plan.clip_batch, 1.5e-3, CLIP_SHIFT),
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
            path=data_minus_noise,
            compiled=not args.smoke,
        )
    save_pipeline(autoencoder, encoder, tokenizer, transformer, args.out)

    pipeline = OpenSoraPipeline.from_pretrained(args.out, dtype=torch.float32)
    clips.measure(sampler(pipeline), Clips(pipeline.vae), stills, moving, plan, args, held_out)


if __name__ == "__main__":
    main()
