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


# -- LTX ---------------------------------------------------------------------------------------------------------


def _guided_text(prompt: Any = None, negative_prompt: Any = None, width: int = WIDTH, **_: Any) -> tuple:
    """Embeddings and masks of prompts and negative prompts."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count
    mask = torch.ones(count, TOKENS, dtype=torch.long)
    return embedded(prompt, TOKENS, width), mask, embedded(negative, TOKENS, width), mask


def ltx(kind: str = "LTXConditionPipeline") -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
        patch_size_t=1,
    )
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomised(transformer),
    )
    return encoding(pipe, _guided_text)


VIDEO = {"height": 32, "width": 32, "num_frames": 9}


def ltx2(kind: str = "LTX2Pipeline") -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=randomised(transformer),
        vocoder=vocoder.eval(),
    )
    return encoding(pipe, lambda **given: _guided_text(**{**given, "width": 16}))


LTX2 = {**VIDEO, "num_frames": 5, "use_cross_timestep": False, "spatio_temporal_guidance_blocks": [0]}


# -- Z-Image, Qwen-Image, FLUX.2 -----------------------------------------------------------------------------------


def z_image(kind: str = "ZImagePipeline", **parts: Any) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    randomised(transformer)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.fill_(0.5)  # made empty
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        **parts,
    )

    def encode(prompt: Any, negative_prompt: Any = None, do_classifier_free_guidance: bool = True, **_: Any) -> tuple:
        count = 1 if isinstance(prompt, str) else len(prompt)
        negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count
        guided = list(embedded(negative, TOKENS, WIDTH)) if do_classifier_free_guidance else []
        return list(embedded(prompt, TOKENS, WIDTH)), guided

    return encoding(pipe, encode)


def qwen(kind: str = "QwenImagePipeline") -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomised(transformer),
    )

    def encode(prompt: Any, *_: Any, **__: Any) -> tuple:
        found = embedded(prompt, TOKENS, WIDTH)
        return found, torch.ones(len(found), TOKENS, dtype=torch.long)

    return encoding(pipe, encode)
