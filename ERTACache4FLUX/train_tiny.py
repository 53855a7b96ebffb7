"""Trains the embedded tiny FLUX pipeline: `python train_tiny.py --data DATA`.

It learns from Fluent emoji (art: Microsoft, MIT licence), which `npm pack @lobehub/fluent-emoji-3d@1.1.0` fetches;
unpack the pictures into DATA/stills (tiny_training/sprites.py has the lines). Stages: autoencoder, flow matching with
dropped captions together with the text encoders, distillation of the guidance into an embedding (as in FLUX.1-dev),
judge. Each resumes after an interruption, by the same command. `--report` shows what is there so far; `--smoke` runs a
step or two of each stage on drawn scenes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from tiny_parts import (
    LATENT_CHANNELS,
    VAE_FACTOR,
    build_scheduler,
    build_text_encoders,
    build_transformer,
    build_vae,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from tiny_training import flow, plan, report, vae
from tiny_training.lessons import Lessons
from tiny_training.loop import small_checkpoints
from tiny_training.plan import MAX_TEXT_LENGTH, SEED, SIZE, Material, Plan
from tiny_training.sources import rendered

FOLDER = Path(__file__).parent
TOKEN_SIDE = SIZE // VAE_FACTOR // 2  # the pipeline packs 2x2 latents into a token
PLAN = Plan(
    vae_examples=24_000,
    vae_steps=3_000,
    stills=24_000,
    still_steps=8_000,
    still_batch=32,
    distil_steps=800,
    sampling_steps=28,
)
FLOW_SHARE = 0.85  # of the time, where that is given
GUIDANCE_SCALE = 3.5
GUIDANCE_STRENGTH = 1.0  # what the scale says of classifier-free guidance: g is 1 + strength (scale - 1)


class FluxVelocity:
    """Calls the transformer as FluxPipeline does, on packed latents (B, tokens, channels * 4)."""

    def __init__(self, parts: nn.ModuleDict, device: str):
        self.sequence, self.pooled = parts["sequence"], parts["pooled"]
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, TOKEN_SIDE, TOKEN_SIDE, device, torch.float32)
        self.text_ids = torch.zeros(MAX_TEXT_LENGTH, 3, device=device)

    def __call__(
        self, model: nn.Module, latents: Tensor, sigma: Tensor, tokens: Tensor, guidance: Tensor | None
    ) -> Tensor:
        return model(
            hidden_states=latents,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=self.pooled(tokens).pooler_output,
            encoder_hidden_states=self.sequence(tokens).last_hidden_state,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]


def trained_autoencoder(material: Material, plan: Plan, args: argparse.Namespace) -> AutoencoderKL:
    """Trained on everything, with the scale that gives its latents unit power; or a finished one, where it is given."""
    if args.vae:
        return vae.finished_vae(build_vae(), args.vae, 1, 3, SIZE, SIZE).to(args.device)
    pixels = rendered(material.everything, plan.vae_examples, args.pixels)
    autoencoder = vae.train_vae(
        build_vae(),
        pixels[:, 0],
        num_steps=plan.vae_steps,
        batch_size=8 * plan.batch_factor,
        learning_rate=4e-3,
        folder=args.work,
        device=args.device,
    )
    latents = vae.encode_all(autoencoder, pixels[:1000, 0], args.device).float()
    autoencoder.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    autoencoder.save_pretrained(args.work / "vae")  # the tiny Open-Sora pipeline starts from it
    return autoencoder


def packed_latents(autoencoder: AutoencoderKL, material: Material, steps: Plan, args: argparse.Namespace) -> Tensor:
    """Normalised, packed latents of all stills, float16 (n, tokens, channels * 4)."""
    path = args.work / f"latents-{material.stills.key}-{steps.stills}-{plan.latents_tag(args, steps)}.pt"
    if not path.exists():
        pixels = rendered(material.stills, steps.stills, args.pixels)
        torch.save(vae.encode_all(autoencoder, pixels[:, 0], args.device), path)
    latents = torch.load(path, weights_only=True).float()
    latents = (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    side = SIZE // VAE_FACTOR
    return FluxPipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, side, side).half()


def trained_transformer(lessons: Lessons, steps: Plan, args: argparse.Namespace) -> nn.ModuleDict:
    """Transformer and text encoders, trained with dropped captions, then its guidance distilled into an embedding."""
    sequence, pooled = build_text_encoders(lessons.vocabulary)
    transformer = build_transformer(guidance_embeds=False)
    parts = nn.ModuleDict({"transformer": transformer, "sequence": sequence, "pooled": pooled})
    velocity = FluxVelocity(parts, args.device)
    latents, tokens = lessons.latents["stills"], lessons.tokens["stills"]
    batches = flow.Batches(latents, tokens, lessons.empty, steps.still_batch * steps.batch_factor, args.device)
    flow.train_flow(
        parts,
        velocity,
        batches,
        num_steps=steps.still_steps,
        learning_rate=2e-3,
        folder=args.work,
        name="flow-stills",
        until=plan.until(args, FLOW_SHARE),
    )
    parts.requires_grad_(False)
    parts["transformer"] = flow.distil_guidance(
        transformer,
        guided_copy(transformer),
        velocity,
        batches,
        num_steps=steps.distil_steps,
        learning_rate=1e-3,
        folder=args.work,
        strength=GUIDANCE_STRENGTH,
        until=plan.until(args, 1.0),
    )
    return parts.eval()


def guided_copy(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The teacher with a guidance embedding that starts as a no-op."""
    student = build_transformer(guidance_embeds=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    last = student.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return student


def save_pipeline(
    autoencoder: AutoencoderKL, parts: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=autoencoder,
        text_encoder=parts["pooled"],
        tokenizer=tokenizer,
        text_encoder_2=parts["sequence"],
        tokenizer_2=tokenizer,
        transformer=parts["transformer"],
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder)


def sampler(pipeline: FluxPipeline, distilled: bool, batch_size: int = 25) -> report.Sample:
    """Pictures as clips of one frame, at the default guidance; the noise of a prompt depends on its number alone.

    Args:
        distilled: the transformer knows the guidance; else its answer without a caption is asked for too.
    """
    pipeline.set_progress_bar_config(disable=True)
    guidance = {} if distilled else {"negative_prompt": "", "true_cfg_scale": GUIDANCE_SCALE}

    @torch.no_grad()
    def sample(prompts: list[str], num_inference_steps: int) -> Tensor:
        parts = []
        for start in tqdm(range(0, len(prompts), batch_size), desc=f"sample, {num_inference_steps} steps"):
            batch = prompts[start : start + batch_size]
            images = pipeline(
                batch,
                height=SIZE,
                width=SIZE,
                num_inference_steps=num_inference_steps,
                guidance_scale=GUIDANCE_SCALE,
                **guidance,
                max_sequence_length=MAX_TEXT_LENGTH,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
                output_type="pt",
            ).images
            parts.append(images[:, :, None])
        return torch.cat(parts).float().cpu()

    return sample


def main() -> None:
    args, steps = plan.parse_arguments(__doc__, FOLDER, PLAN)
    torch.manual_seed(SEED)
    if args.packed:
        with small_checkpoints(args.work, args.out):
            trained_transformer(Lessons.read(args.packed), steps, args)
        return
    material = plan.load_material(args, moving=False)
    autoencoder = trained_autoencoder(material, steps, args)
    lessons = Lessons.of(material, {"stills": packed_latents(autoencoder, material, steps, args)})
    if args.pack:
        lessons.write(args.pack)
        return
    unseen = np.stack([material.unseen.pixels(i)[0] for i in range(8 if args.smoke else 96)])
    fidelity = vae.reconstruction_psnr(autoencoder, unseen, args.device)
    parts = trained_transformer(lessons, steps, args)
    save_pipeline(autoencoder, parts, material.tokenizer, args.out)
    pipeline = FluxPipeline.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    report.measure(sampler(pipeline, distilled=steps.distil_steps > 0), fidelity, material, steps, args)


if __name__ == "__main__":
    main()
