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


def photo(side: int) -> Any:
    """A picture as PIL has it."""
    return diffusers.utils.pt_to_pil(picture(5, side))[0]


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
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
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


VIDEO = {"height": 32, "width": 32, "num_frames": 3}


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


LTX2 = {**VIDEO, "use_cross_timestep": False, "spatio_temporal_guidance_blocks": [0]}


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


class Processor:
    """What QwenImage21Pipeline reads of its processor when it is made."""

    tokenizer: Any = None

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, _: str) -> list[int]:
        return [99]


def qwen21() -> Any:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        processor=Processor(),
        transformer=randomised(transformer),
    )

    def encode(prompt: Any = None, **_: Any) -> tuple:
        found = embedded(prompt, TOKENS, WIDTH)
        return (
            found,
            torch.ones(len(found), TOKENS, dtype=torch.long),
            torch.zeros(len(found), TOKENS, dtype=torch.bool),
        )

    return encoding(pipe, encode)


def flux2(kind: str = "Flux2KleinKVPipeline") -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=kind == "Flux2Pipeline",
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomised(transformer),
    )

    def encode(prompt: Any = None, **_: Any) -> tuple:
        found = embedded(prompt, TOKENS, WIDTH)
        return found, torch.zeros(len(found), TOKENS, 4)

    return encoding(pipe, encode)


# -- Wan ---------------------------------------------------------------------------------------------------------


def wan(kind: str = "WanPipeline", experts: bool = False, scheduler: Any = None, **parts: Any) -> Any:
    """Wan's pipelines; with experts, the second transformer takes over below the boundary."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
        **parts.pop("transformer", {}),
    }
    model = getattr(diffusers, parts.pop("transformer_class", "WanTransformer3DModel"))
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    if experts:
        parts = {"transformer_2": randomised(model(**config), 7), "boundary_ratio": 0.9, **parts}
    pipe = getattr(diffusers, kind)(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=scheduler or diffusers.UniPCMultistepScheduler(**UNIPC),
        transformer=randomised(model(**config)),
        **parts,
    )

    def encode(prompt: Any = None, negative_prompt: Any = None, **_: Any) -> tuple:
        found, _, negative, _ = _guided_text(prompt, negative_prompt)
        return found, negative

    return encoding(pipe, encode)


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
WAN = {"height": 16, "width": 16, "num_frames": 5}


# -- Sana, DiT, FramePack --------------------------------------------------------------------------------------------


def sana_sprint() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=randomised(transformer),
        scheduler=diffusers.SCMScheduler(),
    )

    def encode(prompt: Any, **_: Any) -> tuple:
        found = embedded(prompt, TOKENS, WIDTH)
        return found, torch.ones(len(found), TOKENS, dtype=torch.long)

    return encoding(pipe, encode)


SPRINT = {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False}
SPRINT |= {"complex_human_instruction": None}


def dit(scheduler: Any = None) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=randomised(transformer), vae=autoencoder(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def framepack() -> Any:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "feature_extractor", "image_encoder")
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        **dict.fromkeys(names),
        transformer=randomised(transformer),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )

    def encode(prompt: Any = None, **_: Any) -> tuple:
        found = embedded(prompt, TOKENS, WIDTH)
        return found, embedded(prompt, POOLED), torch.ones(len(found), TOKENS)

    pipe.encode_image = lambda image, **_: torch.ones(len(image), 3, 16)
    return encoding(pipe, encode)


def modular_flux() -> Any:
    """FLUX.1 as a modular pipeline without its text encoders: it is called with embeddings."""
    from diffusers.modular_pipelines.flux import FluxAutoBlocks

    blocks = FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe, parts = blocks.init_pipeline(), flux()
    pipe.update_components(transformer=parts.transformer, vae=parts.vae, scheduler=parts.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
