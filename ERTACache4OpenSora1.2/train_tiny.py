"""Trains the embedded tiny Open-Sora pipeline: `python train_tiny.py`.

Stages: the temporal autoencoder (that of pictures is the tiny FLUX pipeline's), text encoder, rectified flow with
dropped captions on first frames and then on clips, judges of prompt adherence. Each resumes after an interruption; what
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
from tiny_autoencoder import encoded_frames, encoded_latents, load_picture_part, train_temporal_part
from tiny_parts import LATENT_CHANNELS, Clips, build_text_encoder, build_transformer, build_vae
from torch import Tensor, nn
from transformers import T5EncoderModel

from tiny_training import clips, flow, text, video_stages
from tiny_training.clips import NUM_FRAMES, SEED, SIZE, Plan

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-opensora"
GUIDANCE_SCALE = 7.0
# The time transform measures against pictures of 512 pixels, and would crowd a small clip's times near the data:
# here a picture of 64 pixels is what one of 512 is to the real model.
TRANSFORM_SCALE = 512 / SIZE
STILL_SHIFT = 1.2  # of the noise levels that first frames are trained at
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


def sampler(pipeline: OpenSoraPipeline) -> clips.Sample:
    """Samples from the pipeline; no score is appended to a prompt, since the tiny tokenizer does not know the words."""
    return clips.sampler(pipeline, guidance_scale=GUIDANCE_SCALE, aesthetic_score=None)


def train_autoencoder(scenes: clips.Scenes, plan: Plan, args) -> tuple[OpenSoraVAE, np.ndarray, np.ndarray]:
    """The autoencoder, and the latents of first frames and of clips."""
    autoencoder = build_vae().to(args.device)
    load_picture_part(autoencoder)
    video_stages.started(autoencoder, args, "vae")
    stills = encoded_frames(autoencoder, scenes.stills, args.work / "frames-stills.npy", args.device, 64)
    moving = encoded_frames(autoencoder, scenes.moving, args.work / "frames-clips.npy", args.device, 8)
    train_temporal_part(autoencoder, moving, num_steps=plan.vae_steps, folder=args.work, device=args.device)
    return autoencoder, *(encoded_latents(autoencoder, frames, args.device) for frames in (stills, moving))


def main() -> None:
    args, plan = clips.parse_arguments(__doc__, WORK, FOLDER / "tiny", PLAN)
    torch.manual_seed(SEED)
    scenes = video_stages.load_scenes(FOLDER, plan, args)
    autoencoder, *latents = train_autoencoder(scenes, plan, args)
    set_latent_scale(autoencoder, latents[1])
    encoder = video_stages.started(build_text_encoder(len(scenes.tokenizer)), args, "text_encoder")
    video_stages.train_text_encoder(encoder, scenes, plan, args, masked=True)
    transformer = video_stages.started(build_transformer(), args, "transformer")
    transformer = video_stages.train_transformer(
        transformer,
        OpenSoraVelocity(encoder, transformer, scenes.empty, args.device),
        tuple(normalised(autoencoder, part) for part in latents),
        scenes,
        plan,
        args,
        levels=[partial(flow.logit_normal_levels, mean=math.log(shift)) for shift in (STILL_SHIFT, CLIP_SHIFT)],
        path=data_minus_noise,
    )
    save_pipeline(autoencoder, encoder, scenes.tokenizer, transformer, args.out)

    pipeline = OpenSoraPipeline.from_pretrained(args.out, dtype=torch.float32)
    clips.measure(sampler(pipeline), Clips(pipeline.vae), scenes, plan, args)


if __name__ == "__main__":
    main()
