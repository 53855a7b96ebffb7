"""The real architectures with random weights, whole or cut down: no checkpoint, text encoder or VAE is needed."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from real_architecture import RealModel, Reduced, Request, created_on, folder_module, kept, made, normal
from record import ROOT


def build_flux(request: Request, distilled: bool) -> FluxPipeline:
    transformer = made(
        FluxTransformer2DModel,
        request,
        num_layers=kept(19, request.layers),
        num_single_layers=kept(38, request.layers),
        num_attention_heads=kept(24, request.width),
        guidance_embeds=not distilled,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=not distilled, shift=1.0 if distilled else 3.0)
    return FluxPipeline(scheduler, None, None, None, None, None, transformer)


def flux_embeddings(tokens: int, guidance_scale: float) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """Embeddings of a prompt by both text encoders."""

    def embeddings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "prompt_embeds": normal(1, tokens, 4096, device=device, dtype=dtype),
            "pooled_prompt_embeds": normal(1, 768, device=device, dtype=dtype),
            "guidance_scale": guidance_scale,
        }

    return embeddings


def build_wan(request: Request, _: dict[str, int]) -> WanPipeline:
    transformer = made(
        WanTransformer3DModel,
        request,
        num_attention_heads=kept(12, request.width),
        ffn_dim=kept(8960, request.width),
        num_layers=kept(30, request.layers),
    )
    scheduler = folder_module("ERTACache4Wan2.1", "scheduler").make_scheduler("unipc", "official", 5.0)
    return WanPipeline(None, None, None, scheduler, transformer)


def build_cogvideox(request: Request, size: dict[str, int]) -> CogVideoXPipeline:
    transformer = made(
        CogVideoXTransformer3DModel,
        request,
        num_layers=kept(30, request.layers),
        num_attention_heads=kept(30, request.width),
        sample_height=size["height"] // 8,
        sample_width=size["width"] // 8,
        sample_frames=size["num_frames"],
    )
    module = folder_module("ERTACache4CogVideoX", "scheduler")
    # what the 2B checkpoint's scheduler is configured with
    config = {
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 3.0,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    return CogVideoXPipeline(None, None, None, transformer, module.any_grid_scheduler("ddim", config))


def build_opensora(request: Request, _: dict[str, int]) -> Any:
    folder = str(ROOT / "ERTACache4OpenSora1.2")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from opensora12 import OpenSoraPipeline, OpenSoraVAE, RFlowScheduler, STDiT3

    narrow = {
        "block_out_channels": (4,) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    # the pipeline asks its VAE for the latents' size and for nothing else here
    with created_on(request):
        vae = OpenSoraVAE(narrow, {"filters": 4, "num_res_blocks": 1, "num_groups": 2})
    heads = kept(16, request.width)
    transformer = made(STDiT3, request, depth=kept(28, request.layers), hidden_size=72 * heads, num_heads=heads)
    return OpenSoraPipeline(transformer, vae.to(request.device), RFlowScheduler())


def guided(tokens: int, guidance_scale: float) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """Embeddings of a prompt and of none, 4096 wide."""

    def embeddings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        states = normal(1, tokens, 4096, device=device, dtype=dtype)
        return {"prompt_embeds": states, "negative_prompt_embeds": states.flip(1), "guidance_scale": guidance_scale}

    return embeddings


def opensora_embeddings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {"prompt_embeds": normal(1, 300, 4096, device=device, dtype=dtype), "guidance_scale": 7.0}


def flux_model(name: str, steps: tuple[int, ...], tokens: int, guidance_scale: float, few: int) -> RealModel:
    """A FLUX.1; `few` steps where it is cut down. Without guidance it is the distilled one."""
    return RealModel(
        name,
        {"height": 1024, "width": 1024},
        steps,
        torch.bfloat16,
        1,
        lambda request, _: build_flux(request, distilled=guidance_scale == 0),
        flux_embeddings(tokens, guidance_scale),
        Reduced(0.01, 0.125, (few,)),
    )


MODELS = {
    "flux": flux_model("FLUX.1-dev", (28, 50), tokens=512, guidance_scale=3.5, few=6),
    "flux-schnell": flux_model("FLUX.1-schnell", (4, 8), tokens=256, guidance_scale=0.0, few=4),
    "wan": RealModel(
        "Wan2.1-1.3B",
        {"height": 480, "width": 832, "num_frames": 81},
        (50,),
        torch.bfloat16,
        2,
        build_wan,
        guided(512, 5.0),
        Reduced(0.034, 0.25, (6,), frames=5),
    ),
    "cogvideox": RealModel(
        "CogVideoX-2B",
        {"height": 480, "width": 720, "num_frames": 49},
        (50,),
        torch.float16,
        2,
        build_cogvideox,
        guided(226, 6.0),
        Reduced(0.034, 0.25, (6,), frames=9),
    ),
    "opensora": RealModel(
        "Open-Sora 1.2",
        {"height": 480, "width": 854, "num_frames": 51},
        (30,),
        torch.bfloat16,
        2,
        build_opensora,
        opensora_embeddings,
        Reduced(0.036, 0.25, (6,), frames=17),
    ),
}
