"""The real architectures with random weights, whole or cut down: no checkpoint, text encoder or VAE is needed.

Timing does not depend on the weights' values. `layers` is the fraction of each kind of block that is kept, `scale`
the fraction of height and width.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
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
from record import ROOT

CPU = torch.device("cpu")
SIDE_MULTIPLE = 16  # pixels: 8 of the VAE, 2 of the patches


@dataclass(frozen=True)
class Request:
    """What is built and asked for; sizes in pixels and frames, fractions of the real model's (None: left open)."""

    layers: float | None = 1.0
    scale: float | None = 1.0
    frames: int | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Reduced:
    """What a CPU is given where nothing is said: minutes on two cores, and a few GB in float32."""

    layers: float
    scale: float
    steps: tuple[int, ...]
    frames: int | None = None


@dataclass(frozen=True)
class RealModel:
    """One architecture at its real setting.

    Attributes:
        size: height and width in pixels, and frames of videos.
        steps: numbers of scheduler steps that it is used with.
        dtype: that it runs in on a GPU.
        branches: transformer samples of a step: 2 with guidance, in one call or in two.
        build: (request, size) -> pipeline.
        embeddings: (device, dtype) -> arguments of the pipeline in place of a prompt, guidance included.
        reduced: see there.
    """

    name: str
    size: dict[str, int]
    steps: tuple[int, ...]
    dtype: torch.dtype
    branches: int
    build: Callable[[Request, dict[str, int]], Any]
    embeddings: Callable[[torch.device, torch.dtype], dict[str, Any]]
    reduced: Reduced

    def sized(self, request: Request) -> dict[str, int]:
        """height, width and num_frames at the request's scale, rounded to what the pipeline takes."""
        size = {
            name: max(SIDE_MULTIPLE, round(value * request.scale / SIDE_MULTIPLE) * SIDE_MULTIPLE)
            if request.scale != 1
            else value
            for name, value in self.size.items()
            if name != "num_frames"
        }
        if "num_frames" in self.size:
            size["num_frames"] = request.frames or self.size["num_frames"]
        return size

    def pipeline(self, request: Request) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and the arguments of its call beside num_inference_steps and generator."""
        size = self.sized(request)
        pipe = self.build(request, size)
        pipe.set_progress_bar_config(disable=True)
        return pipe, {**size, **self.embeddings(request.device, request.dtype), "output_type": "latent"}


def kept(count: int, fraction: float) -> int:
    """How many of `count` blocks are kept: at least one."""
    if not 0 < fraction <= 1:
        raise ValueError(f"layers is {fraction}: it must be above 0 and at most 1")
    return max(1, round(count * fraction))


@contextmanager
def created_on(request: Request) -> Iterator[None]:
    """Parameters are made on the device and in the dtype at once: twelve billion in float32 fit few machines."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.dtype)
    try:
        with torch.device(request.device):
            yield
    finally:
        torch.set_default_dtype(before)


def made(kind: type, request: Request, **config: Any) -> Any:
    """A transformer of random weights, for inference."""
    torch.manual_seed(0)
    with created_on(request):
        model = kind(**config)
    return model.to(request.device).eval().requires_grad_(False)


def folder_module(folder: str, name: str) -> ModuleType:
    """A module of a model folder under a name of its own, since folders have files of the same names."""
    unique = f"{folder}_{name}".replace(".", "_")
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, ROOT / folder / f"{name}.py")
        sys.modules[unique] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[unique])
    return sys.modules[unique]


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random embeddings; the same for the same shape."""
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


# -- the models ----------------------------------------------------------------------------------------------


def build_flux(request: Request, distilled: bool) -> FluxPipeline:
    transformer = made(
        FluxTransformer2DModel,
        request,
        num_layers=kept(19, request.layers),
        num_single_layers=kept(38, request.layers),
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
        WanTransformer3DModel, request, num_attention_heads=12, ffn_dim=8960, num_layers=kept(30, request.layers)
    )
    scheduler = folder_module("ERTACache4Wan2.1", "scheduler").make_scheduler("unipc", "official", 5.0)
    return WanPipeline(None, None, None, scheduler, transformer)


def build_cogvideox(request: Request, size: dict[str, int]) -> CogVideoXPipeline:
    transformer = made(
        CogVideoXTransformer3DModel,
        request,
        num_layers=kept(30, request.layers),
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
    transformer = made(STDiT3, request, depth=kept(28, request.layers))
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
