"""A Wan pipeline with random weights, small enough for tests: 2 blocks, a VAE of 8 base channels, UMT5 of width 16.

With its text encoder and tokenizer, so that it is called with prompts as the real one is, and can be saved and
loaded again. Untrained, so what it draws means nothing.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from tiny_training.text import build_tokenizer

NUM_STEPS = 10
NUM_BLOCKS = 2
TEXT_TOKENS = 20
TEXT_WIDTH = 16
LATENT_CHANNELS = 4
SIZE = {"height": 32, "width": 48, "num_frames": 5}
SETTINGS = {**SIZE, "num_inference_steps": NUM_STEPS, "guidance_scale": 5.0, "max_sequence_length": TEXT_TOKENS}
NOISE_SCALE = 0.2  # of the random weights: large enough that the velocity depends on step, latents and text
PROMPTS = ["a red circle moving left at the top", "a small blue star at the center"]


def transformer(num_blocks: int = NUM_BLOCKS, **changes: Any) -> WanTransformer3DModel:
    """Width 32 in 2 heads; `changes` replace what the configuration says."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": num_blocks,
    }
    return WanTransformer3DModel(**(config | changes)).eval()


def wan_pipeline(seed: int = 0, flow_shift: float = 5.0) -> WanPipeline:
    """The pipeline in float32, with diffusers' own scheduler."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(TEXT_TOKENS)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    model = transformer()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=NOISE_SCALE)
    # cosines and sines of t 10000^(-k / 8); trained networks hardly hear the fast ones, which would make the
    # velocity of a random one jump from step to step
    waves = model.condition_embedder.time_embedder.linear_1.weight.data
    waves[:, [0, 1, 2, 3, 8, 9, 10, 11]] = 0.0
    autoencoder = AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 1.5, 0.8, 1.2],
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=autoencoder.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        transformer=model,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: WanPipeline, prompts: list[str] | str = PROMPTS, output_type: str = "latent", **overrides: Any
) -> Tensor:
    """Latents (n, 4, f, h, w), or pixels (n, F, 3, H, W) of output_type "pt"; prompt i with seed 100 + i."""
    count = 1 if isinstance(prompts, str) else len(prompts)
    generators = [torch.Generator().manual_seed(100 + i) for i in range(count)]
    arguments = {"negative_prompt": "", **SETTINGS, **overrides}
    return pipe(prompt=prompts, generator=generators, output_type=output_type, **arguments)[0]
