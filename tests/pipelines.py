"""The four kinds of pipeline with random weights, called without a prompt. Holds no test."""

from collections.abc import Callable
from typing import Any

import tiny_cogvideox
import tiny_flux
import tiny_opensora
import tiny_wan
import torch
from subjects import caller
from synthetic import grid_and_shape, synthetic_calibration
from torch import Tensor

from ertacache.calibration import Calibration

STEPS = 8
KINDS = ("flux", "wan", "cogvideox", "opensora")
Made = tuple[Any, Callable[..., Any], Calibration, int]


def made(kind: str, computed_steps: int = 4, guidance: bool = True, steps: int = STEPS) -> Made:
    """Pipeline, a function that runs it to its latents, a calibration for it, and bytes of a guided output."""
    pipe, arguments = _PIPELINES[kind]()
    if not guidance:
        arguments["guidance_scale"] = 1.0
    call = caller(pipe, {**arguments, "output_type": "latent"}, steps)
    timesteps, sigmas, shape, output_bytes = grid_and_shape(pipe, call)
    return pipe, call, synthetic_calibration(pipe, timesteps, sigmas, shape, computed_steps), output_bytes


def _flux() -> tuple[Any, dict[str, Any]]:
    embeddings = {"prompt_embeds": _normal(1, 5, 12), "pooled_prompt_embeds": _normal(1, 8)}
    return tiny_flux.flux_pipeline(), {**embeddings, "height": tiny_flux.SIDE, "width": tiny_flux.SIDE}


def _wan() -> tuple[Any, dict[str, Any]]:
    states = _normal(1, tiny_wan.TEXT_TOKENS, tiny_wan.TEXT_WIDTH)
    return tiny_wan.wan_pipeline(), _guided(states, tiny_wan.SETTINGS)


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    states = _normal(1, tiny_cogvideox.TEXT_TOKENS, tiny_cogvideox.TEXT_WIDTH)
    return tiny_cogvideox.cogvideox_pipeline(), _guided(states, tiny_cogvideox.ARGUMENTS)


def _opensora() -> tuple[Any, dict[str, Any]]:
    states = _normal(1, tiny_opensora.CAPTION_TOKENS, tiny_opensora.CAPTION_CHANNELS)
    size = {"height": tiny_opensora.SIDE, "width": tiny_opensora.SIDE, "num_frames": tiny_opensora.FRAMES}
    return tiny_opensora.tiny_pipeline(), {"prompt_embeds": states, **size}


def _guided(states: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in settings.items() if name != "num_inference_steps"}
    return {"prompt_embeds": states, "negative_prompt_embeds": states.flip(1), **rest}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


_PIPELINES = {"flux": _flux, "wan": _wan, "cogvideox": _cogvideox, "opensora": _opensora}
