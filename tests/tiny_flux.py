"""A FLUX pipeline with random weights, small enough for tests: 2 double and 2 single blocks, 16 image tokens."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

NUM_STEPS = 12
NUM_BLOCKS = 4
TEXT_TOKENS = 5
SIDE = 16  # pixels; the VAE halves them and the pipeline packs 2x2 latents into a token
NOISE_SCALE = 0.2  # of the random weights: large enough that the velocity depends on the step


def flux_pipeline(guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """Without text encoders: it is called with embeddings, and gives latents."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=NOISE_SCALE)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modulated_input(transformer: FluxTransformer2DModel, arguments: dict[str, Any]) -> Tensor:
    """TeaCache's signal: the first block's input after its adaptive norm, of a model without guidance or with."""
    hidden_states = transformer.x_embedder(arguments["hidden_states"])
    guidance = [] if arguments.get("guidance") is None else [arguments["guidance"] * 1000]
    embedding = transformer.time_text_embed(arguments["timestep"] * 1000, *guidance, arguments["pooled_projections"])
    return transformer.transformer_blocks[0].norm1(hidden_states, emb=embedding)[0]


def call(pipe: FluxPipeline, seed: int = 0, true_cfg: bool = False, **overrides: Any) -> Tensor:
    """Packed latents (1, tokens, 16) of one seed, which makes the prompt as well as the noise."""
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, 12, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": NUM_STEPS,
        "generator": torch.Generator().manual_seed(seed + 1),
        "output_type": "latent",
    }
    if true_cfg:
        arguments["negative_prompt_embeds"] = torch.randn(1, TEXT_TOKENS, 12, generator=generator)
        arguments["negative_pooled_prompt_embeds"] = torch.randn(1, 8, generator=generator)
        arguments["true_cfg_scale"] = 3.0
    return pipe(**{**arguments, **overrides}).images
