"""Trains the embedded tiny FLUX pipeline: `python train_tiny.py` (about two hours on two cores).

Stages: autoencoder, text encoders, flow matching with classifier-free guidance, distillation of the guidance into
an embedding (as in FLUX.1-dev), adherence judge. Each resumes after an interruption; what they leave in the work folder
is not needed once the pipeline is written to `tiny/`. `--smoke` runs a step or two of each.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_parts import (
    LATENT_CHANNELS,
    MAX_TEXT_LENGTH,
    SIZE,
    VAE_FACTOR,
    build_text_encoders,
    build_transformer,
    build_vae,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from ertacache.metrics import psnr
from tiny_training import data, flow, judge, text, vae
from tiny_training.sheet import picture_sheet

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-flux"
SEED = 2027
TOKEN_SIDE = SIZE // VAE_FACTOR // 2  # the pipeline packs 2x2 latents into a token
# how much of everything; `judged` are held-out prompts
PLAN = {
    "scenes": 40_000,
    "vae_steps": 5400,
    "text_steps": 2000,
    "flow_steps": 17_000,
    "distil_steps": 800,
    "judge_steps": 1200,
    "judged": 1000,
}
SMOKE = {**dict.fromkeys(PLAN, 2), "scenes": 64}
NUM_INFERENCE_STEPS = 28  # of the pictures that are judged
GUIDANCE_SCALE = 3.5
GUIDANCE_STRENGTH = 1.6  # the scale 3.5 stands for classifier-free guidance of 5, where shapes come out best


class FluxVelocity:
    """Calls the transformer as FluxPipeline does, on packed latents (B, tokens, channels * 4)."""

    def __init__(self, sequence: T5EncoderModel, pooled: CLIPTextModel, device: str):
        self.sequence, self.pooled = sequence.to(device).eval(), pooled.to(device).eval()
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, TOKEN_SIDE, TOKEN_SIDE, device, torch.float32)
        self.text_ids = torch.zeros(MAX_TEXT_LENGTH, 3, device=device)

    def __call__(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, tokens: Tensor, guidance: Tensor | None
    ) -> Tensor:
        with torch.no_grad():
            states = self.sequence(tokens).last_hidden_state
            pooled = self.pooled(tokens).pooler_output
        return model(
            hidden_states=latents,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]


def packed_latents(autoencoder: AutoencoderKL, pixels: np.ndarray, work: Path, device: str) -> Tensor:
    """Normalised, packed latents of all scenes, float16 (n, tokens, channels * 4); sets the VAE's scale."""
    path = work / "latents.pt"
    if not path.exists():
        torch.save(vae.encode_all(autoencoder, pixels, device), path)
    latents = torch.load(path, weights_only=True).float()
    shift, scale = float(latents.mean()), 1 / float(latents.std())
    autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale)
    latents = (latents - shift) * scale
    side = SIZE // VAE_FACTOR
    return FluxPipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, side, side).half()


def guided_copy(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The teacher with a guidance embedding that starts as a no-op."""
    student = build_transformer(guidance_embeds=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    last = student.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return student


def save_pipeline(autoencoder, encoders, tokenizer, transformer, folder: Path) -> None:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder,
        text_encoder=encoders[1],
        tokenizer=tokenizer,
        text_encoder_2=encoders[0],
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


@torch.no_grad()
def sample(pipeline: FluxPipeline, prompts: list[str], num_inference_steps: int = NUM_INFERENCE_STEPS) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1], one a prompt, at the default guidance; the same noise for the same prompts."""
    return pipeline(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=num_inference_steps,
        guidance_scale=GUIDANCE_SCALE,
        max_sequence_length=MAX_TEXT_LENGTH,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="pt",
    ).images


def parse_arguments() -> argparse.Namespace:
    """The command line: folders, device, and how much of everything, in as few steps as can be with --smoke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help=f"checkpoints and data (default: {WORK})")
    parser.add_argument("--out", type=Path, help="where the pipeline goes (default: tiny/, with --smoke below --work)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a step or two of every stage")
    for name, count in PLAN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"(default: {count})")
    args = parser.parse_args()
    for name, count in (SMOKE if args.smoke else PLAN).items():
        if getattr(args, name) is None:
            setattr(args, name, count)
    args.out = args.out or (args.work / "tiny" if args.smoke else FOLDER / "tiny")
    return args


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(SEED)
    pixels = data.rendered_pixels(args.scenes, SEED, SIZE, args.work)
    autoencoder = vae.train_vae(
        build_vae(),
        pixels,
        LATENT_CHANNELS,
        VAE_FACTOR,
        num_steps=args.vae_steps,
        batch_size=32,
        crop=32,
        learning_rate=1.5e-3,
        folder=args.work,
        device=args.device,
    )
    latents = packed_latents(autoencoder, pixels, args.work, args.device)
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH)
    encoders, tokens = trained_text_encoders(tokenizer, args)
    transformer = trained_transformer(latents, encoders, tokenizer, tokens, args)
    save_pipeline(autoencoder, encoders, tokenizer, transformer, args.out)
    measure(pixels, args)


def trained_text_encoders(
    tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> tuple[tuple[T5EncoderModel, CLIPTextModel], Tensor]:
    """Both encoders, and the tokens (scenes, captions, length) of all captions."""
    captions = [caption for i in range(args.scenes) for caption in data.captions_for(i, SEED)]
    if seen := sorted(set(held_out_prompts()) & set(captions)):
        raise SystemExit(f"held-out prompt {seen[0]!r} is a training caption: take it out of prompts/held_out.txt")
    tokens = text.tokenize(tokenizer, captions, MAX_TEXT_LENGTH)
    encoders = build_text_encoders(len(tokenizer))
    text.train_text_encoders(
        *encoders,
        tokens,
        captions,
        num_steps=args.text_steps,
        batch_size=64,
        learning_rate=2e-3,
        folder=args.work,
        device=args.device,
    )
    return encoders, tokens.unflatten(0, (args.scenes, -1))


def trained_transformer(
    latents: Tensor,
    encoders: tuple[T5EncoderModel, CLIPTextModel],
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    args: argparse.Namespace,
) -> FluxTransformer2DModel:
    """Trained with dropped captions, then its guidance distilled into an embedding."""
    velocity = FluxVelocity(*encoders, args.device)
    empty = text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH)
    batches = flow.Batches(latents, tokens, empty, 64, args.device)
    teacher = flow.train_flow(
        build_transformer(guidance_embeds=False),
        velocity,
        batches,
        num_steps=args.flow_steps,
        learning_rate=2e-3,
        folder=args.work,
    )
    return flow.distil_guidance(
        teacher,
        guided_copy(teacher),
        velocity,
        batches,
        num_steps=args.distil_steps,
        learning_rate=1e-3,
        folder=args.work,
        strength=GUIDANCE_STRENGTH,
    )


def held_out_prompts() -> list[str]:
    return (FOLDER / "prompts" / "held_out.txt").read_text(encoding="utf-8").splitlines()


def measure(pixels: np.ndarray, args: argparse.Namespace) -> None:
    """Write the contact sheet and training.json: adherence on held-out prompts and the judge's ceiling."""
    pipeline = FluxPipeline.from_pretrained(args.out, dtype=torch.float32)
    prompts = held_out_prompts()[: args.judged]
    critic = judge.train_judge(pixels, SEED, num_steps=args.judge_steps, folder=args.work, device=args.device).cpu()
    unseen = range(args.scenes, args.scenes + 400)
    frames = np.stack([data.render_frame(data.scene_for(i, SEED), SIZE) for i in unseen])
    ceiling = judge.adherence(
        critic, torch.from_numpy(frames).permute(0, 3, 1, 2), [data.captions_for(i, SEED)[0] for i in unseen]
    )
    images = sample(pipeline, prompts)
    picture_sheet(images[:24], prompts[:24], args.out / "contact_sheet.png")
    report = {
        "adherence": judge.adherence(critic, images, prompts),
        "adherence_of_rendered_scenes": ceiling,
        "prompts": len(prompts),
        "half_steps_psnr": float(psnr(sample(pipeline, prompts, NUM_INFERENCE_STEPS // 2), images).mean()),
        "vae_psnr": vae.reconstruction_psnr(pipeline.vae, (frames[:64] * 255).round().astype(np.uint8)),
        "flow_steps": args.flow_steps,
        "distil_steps": args.distil_steps,
        "num_scenes": args.scenes,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
