"""What bench/gpu.sh does with other caches, made to compute as many steps as ours, and with offloaded weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from step_timer import Call, time_run
from torch import nn

import ertacache
from compare.flops import CallCounter, attention_of, blocks_of
from compare.rivals import CacheDit, MagCache, SeaCache, TaylorSeer
from compare.rivals.base import Clock, replaced, watch
from compare.rivals.diffusers_caches import enabled
from ertacache.calibration import Calibration

Attach = Callable[[], AbstractContextManager[Any]]
ALWAYS = 1e9  # threshold of a cache that reuses whenever it may


def computing_as_many(pipe: Any, calibration: Calibration) -> list[tuple[str, Attach]]:
    """Ours, and others set so that they compute as many steps, K: the first ones, and SeaCache the last.

    Seconds and memory do not depend on which steps these are, and thresholds would with random weights.
    """
    steps, count = calibration.num_inference_steps, len(calibration.computed_steps)
    series = {"cache_interval": steps, "max_order": 2, "disable_cache_before_step": count - 1}
    sea = {"residual_order": 1, "max_consecutive_cached": 0, "retention_steps": count - 1}
    settings = [
        (MagCache([1.0] * steps), {"threshold": ALWAYS, "max_skip_steps": steps, "retention_ratio": count / steps}),
        (TaylorSeer(lite=True), series),
        (SeaCache(), {"threshold": ALWAYS, **sea}),
        (CacheDit(), {"residual_diff_threshold": ALWAYS, "max_warmup_steps": count, "taylorseer_order": 0}),
        (TaylorSeer(lite=False), series),
    ]
    return [
        ("ertacache", partial(ertacache.apply, pipe, calibration)),
        ("first-block-cache", partial(_first_block_cache, pipe, count)),
        *((rival.name, partial(rival.attach, pipe, setting)) for rival, setting in settings),
    ]


@contextmanager
def _first_block_cache(pipe: Any, count: int) -> Iterator[dict[str, Any]]:
    """It has no setting that computes the first steps, so its threshold is moved between steps."""
    head: Any = blocks_of(pipe.transformer)[0]

    def decide(clock: Clock) -> None:
        hook = head._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)
        hook.threshold = -1.0 if clock.step < count else ALWAYS

    with enabled(pipe, FirstBlockCacheConfig(threshold=ALWAYS), decide):
        yield {}


@contextmanager
def computed_steps(pipe: Any) -> Iterator[list[int]]:
    """A list that holds, afterwards, how often the attention of a block in the middle has run."""
    attention = attention_of(blocks_of(pipe.transformer))
    counter, found = CallCounter(attention[len(attention) // 2]), []
    try:
        yield found
    finally:
        counter.remove()
        found.append(counter.calls)


def weights_moved(
    pipe: Any, call: Call, calibration: Calibration, kind: str, device: torch.device
) -> dict[str, list[int] | list[float] | bool]:
    """Bytes of weights that come to the device at each step of a cached run, and the seconds of its steps.

    Args:
        kind: "model" fetches the transformer whole, "sequential" each of its modules when it is called.
    """
    import accelerate
    from accelerate.hooks import remove_hook_from_module

    transformer = pipe.transformer
    transformer.to("cpu")
    if kind == "model":
        accelerate.cpu_offload_with_hook(transformer, device)
    else:
        accelerate.cpu_offload(transformer, device, offload_buffers=len(transformer._parameters) > 0)
    moved, calls = [0] * calibration.num_inference_steps, [0] * calibration.num_inference_steps
    try:
        with (
            ertacache.apply(pipe, calibration),
            watch(pipe) as clock,
            _watched(transformer, device, clock, moved, calls),
        ):
            call()
        with ertacache.apply(pipe, calibration):
            seconds = time_run(pipe, call, device, split=False).steps
    finally:
        remove_hook_from_module(transformer, recurse=True)
        transformer.to(device)
    reused = set(range(len(moved))) - set(calibration.computed_steps)
    return {
        "bytes": moved,
        "fetches": calls,
        "seconds": seconds,
        "computed_steps": calibration.computed_steps,
        "reused_steps_move_nothing": not any(calls[step] for step in reused),
    }


@contextmanager
def _watched(
    transformer: nn.Module, device: torch.device, clock: Clock, moved: list[int], calls: list[int]
) -> Iterator[None]:
    """Count, at the clock's step, what the hooks that fetch weights bring."""

    def fetching(hook: Any, module: nn.Module) -> Callable[..., Any]:
        original, whole = hook.pre_forward, hasattr(hook, "prev_module_hook")

        def fetch(*args: Any, **kwargs: Any) -> Any:
            before = _bytes_on(module, device, whole)
            result = original(*args, **kwargs)
            if clock.step < len(moved):
                moved[clock.step] += _bytes_on(module, device, whole) - before
                calls[clock.step] += 1
            return result

        return fetch

    with ExitStack() as stack:
        for module in transformer.modules():
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:
                stack.enter_context(replaced(hook, "pre_forward", fetching(hook, module)))
        yield


def _bytes_on(module: nn.Module, device: torch.device, recurse: bool) -> int:
    parameters = module.parameters(recurse=recurse)
    return sum(p.numel() * p.element_size() for p in parameters if p.device.type == device.type)
