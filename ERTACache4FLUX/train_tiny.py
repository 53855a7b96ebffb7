"""Trains the embedded tiny FLUX pipeline: `python train_tiny.py` (about two hours on two cores).

Stages: autoencoder, text encoders, flow matching with classifier-free guidance, distillation of the
guidance into an embedding (as in FLUX.1-dev), adherence judge. Each resumes after an interruption; what
they leave in the work folder is not needed once the pipeline is written to `tiny/`.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw
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
from transformers import CLIPTextModel, T5EncoderModel

from ertacache.metrics import psnr
from tiny_training import data, flow, judge, text, vae

FOLDER = Path(__file__).parent
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ertacache" / "train-tiny-flux"
NUM_SCENES = 40_000
SEED = 2027
TOKEN_SIDE = SIZE // VAE_FACTOR // 2  # the pipeline packs 2x2 latents into a token
FLOW_STEPS = 17_000
DISTIL_STEPS = 800
NUM_INFERENCE_STEPS = 28  # of the pictures that are judged
GUIDANCE_STRENGTH = 1.6  # the default scale 3.5 stands for classifier-free guidance of 5, where shapes come out best


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
        guidance_scale=3.5,
        max_sequence_length=MAX_TEXT_LENGTH,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="pt",
    ).images


def contact_sheet(images: Tensor, prompts: list[str], path: Path, scale: int = 3) -> None:
    """Write the first 24 pictures with their prompts."""
    tile, line = SIZE * scale, 62
    sheet = Image.new("RGB", (6 * (tile + 8), 4 * (tile + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images[:24], prompts, strict=False)):
        pixels = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        corner = (i % 6 * (tile + 8), i // 6 * (tile + line))
        sheet.paste(pixels.resize((tile, tile), Image.Resampling.NEAREST), corner)
        draw.multiline_text((corner[0] + 2, corner[1] + tile + 2), _wrap(prompt, 34), fill="black", spacing=1)
    sheet.save(path)


def _wrap(prompt: str, width: int) -> str:
    lines = [""]
    for word in prompt.split():
        lines = [*lines, word] if len(lines[-1]) + len(word) > width else [*lines[:-1], f"{lines[-1]} {word}".strip()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help=f"checkpoints and data (default: {WORK})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS)
    parser.add_argument("--distil-steps", type=int, default=DISTIL_STEPS)
    args = parser.parse_args()
    torch.manual_seed(SEED)

    pixels = data.rendered_pixels(NUM_SCENES, SEED, SIZE, args.work)
    autoencoder = vae.train_vae(
        build_vae(),
        pixels,
        LATENT_CHANNELS,
        VAE_FACTOR,
        num_steps=5400,
        batch_size=32,
        crop=32,
        learning_rate=1.5e-3,
        folder=args.work,
        device=args.device,
    )
    latents = packed_latents(autoencoder, pixels, args.work, args.device)

    captions = [data.captions_for(i, SEED) for i in range(NUM_SCENES)]
    tokenizer = text.build_tokenizer(MAX_TEXT_LENGTH)
    flat = [c for group in captions for c in group]
    held_out = (FOLDER / "prompts" / "held_out.txt").read_text().splitlines()
    if seen := sorted(set(held_out) & set(flat)):
        raise SystemExit(f"held-out prompt {seen[0]!r} is a training caption: take it out of prompts/held_out.txt")
    tokens = text.tokenize(tokenizer, flat, MAX_TEXT_LENGTH)
    encoders = build_text_encoders(len(tokenizer))
    text.train_text_encoders(
        *encoders, tokens, flat, num_steps=2000, batch_size=64, learning_rate=2e-3, folder=args.work, device=args.device
    )

    velocity = FluxVelocity(*encoders, args.device)
    empty = text.tokenize(tokenizer, [""], MAX_TEXT_LENGTH)
    batches = flow.Batches(latents, tokens.unflatten(0, (NUM_SCENES, -1)), empty, 64, args.device)
    teacher = flow.train_flow(
        build_transformer(guidance_embeds=False),
        velocity,
        batches,
        num_steps=args.flow_steps,
        learning_rate=2e-3,
        folder=args.work,
    )
    student = flow.distil_guidance(
        teacher,
        guided_copy(teacher),
        velocity,
        batches,
        num_steps=args.distil_steps,
        learning_rate=1e-3,
        folder=args.work,
        strength=GUIDANCE_STRENGTH,
    )
    save_pipeline(autoencoder, encoders, tokenizer, student, FOLDER / "tiny")
    measure(pixels, args)


def measure(pixels: np.ndarray, args: argparse.Namespace) -> None:
    """Write the contact sheet and tiny/training.json: adherence on held-out prompts and the judge's ceiling."""
    pipeline = FluxPipeline.from_pretrained(FOLDER / "tiny", torch_dtype=torch.float32)
    prompts = (FOLDER / "prompts" / "held_out.txt").read_text().splitlines()
    critic = judge.train_judge(pixels, SEED, num_steps=1200, folder=args.work, device=args.device).cpu()
    unseen = range(NUM_SCENES, NUM_SCENES + 400)
    frames = np.stack([data.render_frame(data.scene_for(i, SEED), SIZE) for i in unseen])
    ceiling = judge.adherence(
        critic, torch.from_numpy(frames).permute(0, 3, 1, 2), [data.captions_for(i, SEED)[0] for i in unseen]
    )
    images = sample(pipeline, prompts)
    contact_sheet(images, prompts, FOLDER / "tiny" / "contact_sheet.png")
    report = {
        "adherence": judge.adherence(critic, images, prompts),
        "adherence_of_rendered_scenes": ceiling,
        "prompts": len(prompts),
        "half_steps_psnr": float(psnr(sample(pipeline, prompts, NUM_INFERENCE_STEPS // 2), images).mean()),
        "vae_psnr": vae.reconstruction_psnr(pipeline.vae, (frames[:64] * 255).round().astype(np.uint8)),
        "flow_steps": args.flow_steps,
        "distil_steps": args.distil_steps,
        "num_scenes": NUM_SCENES,
    }
    (FOLDER / "tiny" / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
