"""Caches of diffusers that work module by module: TaylorSeer, PyramidAttentionBroadcast, FasterCache."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.hooks._common import _ATTENTION_CLASSES
from torch import nn

from compare.rivals.base import Clock, NotApplicable, Rival, Setting, replaced
from compare.rivals.diffusers_caches import enabled

WORKING_MODULES = re.compile(r"(cross_)?attn\d?|ff|ffn|ff_context|mlp|proj_mlp|proj_out")  # children of a block
ALL_TIMESTEPS = (-1, 1001)


class TaylorSeer(Rival):
    """Extrapolate module outputs between two computed steps, with `max_order` terms of a Taylor series.

    lite: extrapolate only the transformer's output projection and skip all blocks, as diffusers' lite mode does.
    That mode looks for a `proj_out`; for models that name it otherwise the modules are named here. Without lite:
    attention and feed-forward of each block, as the authors do; diffusers' default patterns leave the feed-forward
    computed on FLUX and match nothing on Wan and CogVideoX.
    """

    knob = "cache_interval"
    ORDERS = (1, 2)

    def __init__(self, lite: bool = True):
        self.lite = lite
        self.name = "taylorseer-lite" if lite else "taylorseer"

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        intervals = range(max(2, num_steps // 2), 1, -1)
        return [
            [{"cache_interval": i, "max_order": o, "disable_cache_before_step": warm_up} for i in intervals]
            for o in self.ORDERS
            for warm_up in (o + 1, 2 * o + 2)
        ]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        dtype = next(pipe.transformer.parameters()).dtype  # its default, bfloat16, would handicap it in float32
        modules = _lite_modules(pipe.transformer) if self.lite else _all_modules(pipe.transformer)
        config = TaylorSeerCacheConfig(**setting, taylor_factors_dtype=dtype, **modules)
        with enabled(pipe, config):
            yield {}


def _lite_modules(transformer: nn.Module) -> dict[str, Any]:
    """What lite mode skips and extrapolates: its own choice where that exists, else the same parts by name."""
    children = dict(transformer.named_children())
    if "proj_out" in children:
        return {"use_lite_mode": True}
    lists = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    outside = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] not in lists
    ]
    if not lists or not outside:
        raise NotApplicable("TaylorSeer lite finds no blocks or no output projection")
    blocks = [rf"{re.escape(name)}\.\d+" for name in lists]
    return {"skip_predict_identifiers": blocks, "cache_identifiers": [re.escape(outside[-1])]}


def _all_modules(transformer: nn.Module) -> dict[str, Any]:
    """Patterns that match the attention and feed-forward modules of every block, and nothing else."""
    names = []
    for list_name, blocks in transformer.named_children():
        if isinstance(blocks, nn.ModuleList):
            children = {name for block in blocks for name, _ in block.named_children()}
            names += [rf"{list_name}\.\d+\.{name}" for name in sorted(children) if WORKING_MODULES.fullmatch(name)]
    if not names:
        raise NotApplicable("TaylorSeer finds no attention or feed-forward module in the blocks")
    return {"cache_identifiers": names}


class PyramidAttentionBroadcast(Rival):
    """Compute attention every `skip_range`-th step; everything else always runs, so it saves little."""

    name = "pyramid-attention-broadcast"
    knob = "skip_range"
    # The published range of timesteps, and all of them.
    VARIANTS = ((100, 800), ALL_TIMESTEPS)

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [
            [{"skip_range": n, "lowest_timestep": low, "highest_timestep": high} for n in range(num_steps, 1, -1)]
            for low, high in self.VARIANTS
        ]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        _check_attention(pipe.transformer, self.name)
        timesteps = (int(setting["lowest_timestep"]), int(setting["highest_timestep"]))
        kinds = ["spatial", "cross"]
        if hasattr(pipe.transformer, "temporal_transformer_blocks"):
            kinds.append("temporal")
        ranges = {f"{kind}_attention_block_skip_range": int(setting["skip_range"]) for kind in kinds}
        spans = {f"{kind}_attention_timestep_skip_range": timesteps for kind in kinds}
        callback = {"current_timestep_callback": lambda: pipe.current_timestep}
        with enabled(pipe, PyramidAttentionBroadcastConfig(**ranges, **spans, **callback), _one_branch_only):
            yield {}


class FasterCache(Rival):
    """Extrapolate attention outputs, and the unconditional half of a batched call from the conditional one."""

    name = "fastercache"
    knob = "skip_range"
    VARIANTS = (681, 901)  # reuse below this timestep: diffusers' default, and nearly all (the first must compute)

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [
            [{"skip_range": n, "highest_timestep": high} for n in range(num_steps, 1, -1)] for high in self.VARIANTS
        ]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        _check_attention(pipe.transformer, self.name)
        distilled = bool(pipe.transformer.config.get("guidance_embeds", False))
        timesteps = (-1, int(setting["highest_timestep"]))
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=int(setting["skip_range"]),
            spatial_attention_timestep_skip_range=timesteps,
            unconditional_batch_skip_range=int(setting["skip_range"]),
            unconditional_batch_timestep_skip_range=timesteps,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BFCHW" if _frames_first(pipe) else "BCFHW",
            is_guidance_distilled=distilled,
            current_timestep_callback=lambda: pipe.current_timestep,
        )

        def check_branch(clock: Clock) -> None:
            _one_branch_only(clock)
            if not distilled and clock.branch != "cond_uncond":
                raise NotApplicable("FasterCache needs both branches in one call, or a guidance-distilled model")

        # It warns at each attaching that it is experimental, and a tuner attaches it many times.
        log = logging.getLogger("diffusers.hooks.faster_cache")
        with replaced(log, "disabled", True), enabled(pipe, config, check_branch):
            yield {}


def _check_attention(transformer: nn.Module, name: str) -> None:
    """Raise NotApplicable for models with attention of their own, which diffusers' caches do not find."""
    if not any(isinstance(module, _ATTENTION_CLASSES) for module in transformer.modules()):
        kind = type(transformer).__name__
        raise NotApplicable(f"{name} caches the outputs of diffusers' attention classes, and {kind} has none of them")


def _one_branch_only(clock: Clock) -> None:
    """Raise NotApplicable for two calls per step: these caches hold one state per module."""
    if clock.calls > 1:
        raise NotApplicable("its state does not tell guidance branches apart, and this pipeline calls twice a step")


def _frames_first(pipe: Any) -> bool:
    """Whether latents are (n, frames, channels, H, W), as only CogVideoX has them."""
    return "CogVideoX" in type(pipe.transformer).__name__
