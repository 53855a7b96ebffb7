"""Tiny pipelines of diffusers with random weights, built as the real ones are but for their text encoders.

A builder returns a `Case`: the pipeline, arguments of its call, and what each prompt has of its own. Holds no test.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

NOISE_SCALE = 0.2  # of random weights: large enough that the output depends on the step
SIDE = 16  # pixels
TOKENS, WIDTH, POOLED = 5, 12, 8


@dataclass
class Case:
    """A pipeline, what it is called with, and how it is calibrated.

    Attributes:
        arguments: of every call.
        per_prompt: a function from the number of prompts to the arguments of which each has its own.
        prompts: whether the call takes a prompt.
    """

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    per_prompt: Callable[[int], dict[str, list[Any]]] = lambda count: {}
    prompts: bool = True


def randomised(module: nn.Module, seed: int = 0, scale: float = NOISE_SCALE) -> nn.Module:
    """The module with random matrices, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=scale, generator=generator)
    return module.eval()


def embedded(prompt: Any, *shape: int) -> Tensor:
    """Random numbers that depend on each prompt: (prompts, *shape)."""
    prompts = [prompt] if isinstance(prompt, str) or prompt is None else list(prompt)
    generators = [torch.Generator().manual_seed(zlib.crc32(str(p).encode())) for p in prompts]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def encoding(pipe: Any, encode: Callable[[Any], Any]) -> Any:
    """The pipeline with `encode_prompt` in place of text encoders: what `encode` makes of a prompt."""
    original = type(pipe).encode_prompt

    @functools.wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        return encode(*args, **kwargs)

    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """An image VAE that halves its pictures."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
        **changes,
    ).eval()


def picture(seed: int, side: int = SIDE) -> Tensor:
    """An image (1, 3, side, side) in [0, 1]."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


# -- FLUX.1 --------------------------------------------------------------------------------------------------


def flux_transformer(seed: int = 0, **changes: Any) -> nn.Module:
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return randomised(diffusers.FluxTransformer2DModel(**{**config, **changes}), seed)


def _flux_text(prompt: Any = None, prompt_2: Any = None, prompt_embeds: Any = None, **rest: Any) -> tuple:
    if prompt_embeds is not None:
        return prompt_embeds, rest["pooled_prompt_embeds"], torch.zeros(TOKENS, 3)
    return embedded(prompt, TOKENS, WIDTH), embedded(prompt, POOLED), torch.zeros(TOKENS, 3)


def flux(
    kind: str = "FluxPipeline", scheduler: Any = None, transformer: dict[str, Any] | None = None, **parts: Any
) -> Any:
    """One of FLUX.1's pipelines."""
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux_transformer(**(transformer or {})),
        **parts,
    )
    return encoding(pipe, _flux_text)


def flux_controlnet(seed: int = 3) -> nn.Module:
    config = dict(flux_transformer().config)
    names = ("patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    kept = {name: config[name] for name in (*names, "pooled_projection_dim", "guidance_embeds", "axes_dims_rope")}
    return randomised(diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1, **kept), seed)


SIZE = {"height": SIDE, "width": SIDE}


def flux_case(kind: str = "FluxPipeline", **arguments: Any) -> Case:
    return Case(flux(kind), {**SIZE, **arguments})


# -- Stable Diffusion 3 ----------------------------------------------------------------------------------------


def sd3(kind: str = "StableDiffusion3Pipeline", scheduler: Any = None, **parts: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipe = getattr(diffusers, kind)(
        transformer=randomised(transformer),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
        **parts,
    )

    def encode(prompt: Any = None, *_: Any, negative_prompt: Any = None, **__: Any) -> tuple:
        count = 1 if isinstance(prompt, str) else len(prompt)
        negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count
        return (
            embedded(prompt, TOKENS, WIDTH),
            embedded(negative, TOKENS, WIDTH),
            embedded(prompt, POOLED),
            embedded(negative, POOLED),
        )

    return encoding(pipe, encode)


# -- PixArt ----------------------------------------------------------------------------------------------------


def pixart(kind: str = "PixArtAlphaPipeline", scheduler: Any = None, side: int = 8) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,  # of 1024 pixels, sizes take a third of the width each
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=side,
        norm_num_groups=4,
    )
    pipe = getattr(diffusers, kind)(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        transformer=randomised(transformer, scale=0.1),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(),
    )

    def encode(prompt: Any, *_: Any, negative_prompt: Any = "", **__: Any) -> tuple:
        count = 1 if isinstance(prompt, str) else len(prompt)
        negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * count
        mask = torch.ones(count, TOKENS, dtype=torch.long)
        return embedded(prompt, TOKENS, WIDTH), mask, embedded(negative, TOKENS, WIDTH), mask

    return encoding(pipe, encode)


PIXART = {**SIZE, "use_resolution_binning": False, "clean_caption": False}
