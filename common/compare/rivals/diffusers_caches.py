"""Caches of diffusers that skip most of the transformer: FirstBlockCache, MagCache, SeaCache.

Handles what they trip over: counters that go on after a run that raised (reset at every start), hooks that match no
module (refused), states per guidance branch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks import SeaCacheConfig
from torch import Tensor, nn

from compare.rivals.base import (
    Clock,
    NotApplicable,
    Rival,
    Run,
    Setting,
    bound_arguments,
    first_input,
    geometric,
    replaced,
    watch,
)
from compare.rivals.stack import intercepted


def _nothing(clock: Clock) -> None:
    pass


@contextmanager
def enabled(pipe: Any, config: Any, on_call: Callable[[Clock], None] = _nothing) -> Iterator[Clock]:
    """Run `pipe.transformer` with diffusers' cache `config`; `on_call` sees every call of the transformer.

    Raises:
        NotApplicable: the transformer takes no cache, has one, or none of its modules was hooked.
    """
    transformer = pipe.transformer
    if not hasattr(transformer, "enable_cache"):
        raise NotApplicable(f"{type(transformer).__name__} has no enable_cache")
    if transformer.is_cache_enabled:
        raise NotApplicable(f"{type(transformer).__name__} has a cache enabled already")
    before = _hooks(transformer)
    try:
        transformer.enable_cache(config)
    except (IndexError, ValueError) as error:  # what diffusers raises for blocks that it does not find or know
        for module, name in _hooks(transformer) - before:  # some may be hooked already
            module._diffusers_hook.remove_hook(name, recurse=False)
        raise NotApplicable(f"{type(config).__name__} does not fit {type(transformer).__name__}: {error}") from error
    try:
        if _hooks(transformer) == before:
            raise NotApplicable(f"{type(config).__name__} hooks no module of {type(transformer).__name__}")
        with watch(pipe, transformer._reset_stateful_cache, lambda: on_call(clock)) as clock:
            yield clock
    finally:
        transformer.disable_cache()


def _hooks(transformer: nn.Module) -> set[tuple[Any, str]]:
    """(module, name of the hook) of every diffusers hook in the transformer."""
    modules: list[Any] = [module for module in transformer.modules() if hasattr(module, "_diffusers_hook")]
    return {(module, name) for module in modules for name in module._diffusers_hook.hooks}


@contextmanager
def _enabled(pipe: Any, config: Any) -> Iterator[dict[str, Any]]:
    with enabled(pipe, config):
        yield {}


class FirstBlockCache(Rival):
    """Reuse the residual of all blocks after the first while the first one's residual changes little."""

    name = "first-block-cache"
    knob = "threshold"

    def settings(self, num_steps: int) -> list[Setting]:
        return [{"threshold": value} for value in geometric(20.0, 0.005)]

    def attach(self, pipe: Any, setting: Setting) -> AbstractContextManager[dict[str, Any]]:
        return _enabled(pipe, FirstBlockCacheConfig(threshold=float(setting["threshold"])))


class _MagnitudeRecorder:
    """Ratios of the stack's residual norms in successive steps, as MagCache defines them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.last: dict[str, Tensor] = {}
        self.ratios: list[list[float]] = []  # per step, of all runs and branches

    def enter(self, arguments: dict[str, Any]) -> None:
        return None

    def leave(self, hidden_in: Tensor, hidden_out: Tensor) -> None:
        norms = (hidden_out - hidden_in).float().norm(dim=-1)  # (n, tokens)
        last = self.last.get(self.clock.branch)
        while len(self.ratios) <= self.clock.step:
            self.ratios.append([])
        self.ratios[self.clock.step].append(1.0 if last is None else (norms / (last + 1e-8)).mean().item())
        self.last[self.clock.branch] = norms


class MagCache(Rival):
    """Reuse the stack's residual while the product of its calibrated magnitude ratios stays near 1.

    diffusers' own calibration prints the ratios of one prompt; here they are averaged over the calibration prompts and
    the guidance branches.
    """

    name = "magcache"
    knob = "threshold"
    # (steps reused in a row, fraction of first steps never reused): diffusers' default, the authors' FLUX
    # setting, and one without those limits, which the low costs need
    VARIANTS = ((3, 0.2), (5, 0.1), (100, 0.1))

    def __init__(self, mag_ratios: list[float] | None = None):
        self.mag_ratios, self.recorded = mag_ratios, 0.0

    def prepare(self, pipe: Any, runs: Sequence[Run], num_steps: int) -> None:
        self.recorded = float(len(runs))
        recorder = _MagnitudeRecorder()
        with watch(pipe, recorder.last.clear) as recorder.clock, intercepted(pipe.transformer, recorder):
            for run in runs:
                run()
        self.mag_ratios = [sum(values) / len(values) for values in recorder.ratios]

    def spent(self, setting: Setting) -> float | None:
        return self.recorded

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [
            [{"threshold": t, "max_skip_steps": steps, "retention_ratio": r} for t in geometric(10.0, 1e-4)]
            for steps, r in self.VARIANTS
        ]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        if self.mag_ratios is None:
            raise NotApplicable("MagCache has no magnitude ratios yet: call prepare")
        num_steps = len(self.mag_ratios)

        def check_length(clock: Clock) -> None:  # it would wrap or stop half-way, without a word
            if clock.num_steps != num_steps:
                raise NotApplicable(f"MagCache is calibrated for {num_steps} steps, and this run has {clock.num_steps}")

        config = MagCacheConfig(**setting, num_inference_steps=num_steps, mag_ratios=self.mag_ratios)
        with enabled(pipe, config, check_length):
            yield {}


class SeaCache(Rival):
    """Reuse or extrapolate the stack's residual while the spectrally filtered latents change little."""

    name = "seacache"
    knob = "threshold"
    VARIANTS = ((1, 2), (1, 0), (0, 0))  # (order of the residual, steps reused in a row; 0 = no limit)

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [
            [{"threshold": t, "residual_order": o, "max_consecutive_cached": m} for t in geometric(20.0, 0.005)]
            for o, m in self.VARIANTS
        ]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        config = SeaCacheConfig(**setting, raw_vision_callback=visual_latents)
        with _located_context(pipe), enabled(pipe, config):
            yield {}


@contextmanager
def _located_context(pipe: Any) -> Iterator[None]:
    """Tell SeaCache step and noise level through cache contexts, as only Wan's pipeline does itself."""
    enter = pipe.transformer.cache_context
    with watch(pipe) as clock:

        def located(name: str, **kwargs: Any) -> Any:
            place = {"step_index": clock.step, "num_inference_steps": clock.num_steps, "sigma": _sigma(pipe, clock)}
            return enter(name, **{**place, **kwargs})

        with replaced(pipe.transformer, "cache_context", located):
            yield


def _sigma(pipe: Any, clock: Clock) -> float:
    """Noise level in [0, 1] at the current step: flow matching's sigma, else sqrt(1 - alpha_bar)."""
    scheduler = pipe.scheduler
    if hasattr(scheduler, "sigmas") and float(scheduler.sigmas.max()) <= 1:
        return float(scheduler.sigmas[clock.step])
    return float((1 - scheduler.alphas_cumprod[int(scheduler.timesteps[clock.step])]).clamp_min(0).sqrt())


def visual_latents(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents of a transformer call, each (C, T, H, W), of a video or unpacked from FLUX's 2x2 tokens."""
    arguments = bound_arguments(transformer, args, kwargs)
    hidden = first_input(transformer, args, kwargs)
    if hidden.ndim == 5:  # (n, C, T, H, W), or with frames first as CogVideoX has them
        frames_first = hidden.shape[1] != transformer.config.in_channels
        return list(hidden.transpose(1, 2) if frames_first else hidden)
    if "img_ids" not in arguments:
        raise ValueError("no positions of the image tokens")  # SeaCache reports it and runs uncached
    height, width = (int(n) + 1 for n in arguments["img_ids"].reshape(-1, 3)[:, 1:].amax(dim=0))
    tokens = hidden.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))  # (n, H/2, W/2, C, 2, 2)
    return list(tokens.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4).unsqueeze(2))
