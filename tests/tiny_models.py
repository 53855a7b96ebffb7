"""The four tiny random pipelines under one interface, for tests that hold for every model. Holds no test."""

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import tiny_cogvideox
import tiny_flux
import tiny_opensora
import tiny_wan
import torch
from diffusers import FluxPipeline
from torch import Tensor

import ertacache
from ertacache.calibration import Calibration

NUM_STEPS = 6
COMPUTED_STEPS = 3
PROMPTS = ("a red cat runs", "a blue dog jumps")
NAMES = ("flux", "wan", "cogvideox", "opensora")


class PromptedFlux(FluxPipeline):
    """Makes its embeddings from the letters of the prompt, since the tiny pipeline has no text encoders."""

    def encode_prompt(self, prompt: Any = None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        generators = [torch.Generator().manual_seed(zlib.crc32(p.encode())) for p in _as_list(prompt)]
        embeds = torch.stack([torch.randn(tiny_flux.TEXT_TOKENS, 12, generator=g) for g in generators])
        pooled = torch.stack([torch.randn(8, generator=g) for g in generators])
        like = self.transformer.x_embedder.weight.dtype if self.transformer.dtype.is_floating_point else torch.float32
        return embeds.to(like), pooled.to(like), torch.zeros(tiny_flux.TEXT_TOKENS, 3, dtype=like)


def _as_list(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


@dataclass(frozen=True)
class Model:
    """How to make one model's pipeline, what to call it with, and how its pipeline sets the scheduler's grid."""

    make: Any
    arguments: dict[str, Any]
    other_shape: dict[str, Any]
    grid: dict[str, Any]


def _flux() -> PromptedFlux:
    pipe = tiny_flux.flux_pipeline()
    # a fixed shift: another size then leaves the grid where it is, as in the other models
    pipe.scheduler = type(pipe.scheduler)(shift=3.0)
    pipe.vae.register_to_config(shift_factor=0.1)  # which decoding adds
    return PromptedFlux(**pipe.components)


_WAN = {key: value for key, value in tiny_wan.SETTINGS.items() if key != "num_inference_steps"}
_COG = {key: value for key, value in tiny_cogvideox.ARGUMENTS.items() if key != "num_inference_steps"}
_SORA = {"height": 16, "width": 16, "num_frames": 17}
_EVEN = {"sigmas": [1 - i / NUM_STEPS for i in range(NUM_STEPS)]}
_STEPS = {"num_inference_steps": NUM_STEPS}
MODELS = {
    "flux": Model(_flux, {"height": 16, "width": 16}, {"height": 16, "width": 32}, _EVEN),
    "wan": Model(tiny_wan.wan_pipeline, {**_WAN, "height": 16, "width": 16}, {"height": 16, "width": 32}, _STEPS),
    "cogvideox": Model(tiny_cogvideox.cogvideox_pipeline, _COG, {"num_frames": 5}, _STEPS),
    "opensora": Model(tiny_opensora.tiny_pipeline, _SORA, {"num_frames": 34}, {**_STEPS, **_SORA}),
}


def set_grid(pipe: Any, name: str) -> None:
    """Begin a run without the pipeline, on the grid that it would take."""
    pipe.scheduler.set_timesteps(**MODELS[name].grid)


def make(name: str) -> Any:
    pipe = MODELS[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, name: str, prompts: tuple[str, ...] = PROMPTS[:1], **overrides: Any) -> Tensor:
    """Final latents; prompt i from seed 100 + i."""
    generators = [torch.Generator().manual_seed(100 + i) for i in range(len(prompts))]
    arguments = {**MODELS[name].arguments, "num_inference_steps": NUM_STEPS, "output_type": "latent", **overrides}
    return pipe(prompt=list(prompts), generator=generators, **arguments)[0]


def calibrate(pipe: Any, name: str, **kwargs: Any) -> Calibration:
    """On two prompts, without a prediction of the quality."""
    kwargs = {"computed_steps": COMPUTED_STEPS, "effort": "fast", "num_inference_steps": NUM_STEPS, **kwargs}
    return ertacache.calibrate(
        pipe, list(PROMPTS), seeds=range(2), progress=False, **{**MODELS[name].arguments, **kwargs}
    )


@functools.cache
def fitted(name: str) -> Calibration:
    """The calibration of a freshly made pipeline, which all pipelines made here have the weights of."""
    return calibrate(make(name), name)


@functools.cache
def expected(name: str) -> tuple[Tensor, Tensor]:
    """Latents without ERTACache and with `fitted`, from a freshly made pipeline that did nothing else."""
    pipe = make(name)
    plain = call(pipe, name)
    with ertacache.apply(pipe, fitted(name)):
        return plain, call(pipe, name)
