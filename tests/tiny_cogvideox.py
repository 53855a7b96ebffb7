"""A CogVideoX pipeline with random weights, small enough for tests: 2 blocks, 9 frames in 3 latents of 4x4."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from tiny_training.text import build_tokenizer

FOLDER = Path(__file__).parents[1] / "ERTACache4CogVideoX"
NUM_STEPS = 10
NUM_FRAMES = 9
SIDE = 16  # pixels; the VAE quarters them
TEXT_TOKENS = 12
TEXT_WIDTH = 16
NOISE_SCALE = 0.15  # of the random weights: large enough that the output depends on the step and on the prompt
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def folder_module(name: str) -> ModuleType:
    """A module of the model folder under a name of its own, since other folders have files of the same names."""
    unique = f"cogvideox_{name}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, FOLDER / f"{name}.py")
        sys.modules[unique] = importlib.util.module_from_spec(spec)
        neighbours = {n: folder_module(n) for n in ("scheduler", "transformer") if name == "generate"}
        sys.modules.update(neighbours)
        try:
            spec.loader.exec_module(sys.modules[unique])
        finally:
            for neighbour in neighbours:
                del sys.modules[neighbour]
    return sys.modules[unique]


def cogvideox_pipeline(solver: str | None = "ddim", seed: int = 0) -> CogVideoXPipeline:
    """Random weights; on the folder's scheduler for `solver`, or on the stock DDIM for None."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(TEXT_TOKENS)
    text = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=SIDE // 4,
        sample_height=SIDE // 4,
        sample_frames=NUM_FRAMES,
        max_text_seq_length=TEXT_TOKENS,
    )
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=NOISE_SCALE)
    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=SIDE,
        sample_width=SIDE,
    )
    stock = CogVideoXDDIMScheduler(**SCHEDULE)
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text).eval(),
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        scheduler=folder_module("scheduler").any_grid_scheduler(solver, stock.config) if solver else stock,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


ARGUMENTS = {
    "height": SIDE,
    "width": SIDE,
    "num_frames": NUM_FRAMES,
    "num_inference_steps": NUM_STEPS,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_TOKENS,
}
PROMPTS = [
    "a large red star at the left",
    "a small blue ring moving up at the top",
    "a striped green cross at the center on a dark background",
    "a dotted pink circle moving right at the bottom",
]


def call(pipe: CogVideoXPipeline, prompts: list[str] | None = None, seed: int = 50, **overrides: Any) -> Tensor:
    """Latents (prompts, 3, 4, 4, 4), prompt i from seed + i; two held-out prompts where none are given."""
    prompts = prompts or ["a yellow square at the right", "a small purple triangle moving down at the top left"]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    arguments = {"output_type": "latent", **ARGUMENTS, **overrides}
    return pipe(prompts, generator=generators, **arguments).frames
