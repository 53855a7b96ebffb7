"""Count what a run costs: FLOPs of the transformer, and calls of its blocks and their attention.

    with TransformerCost(pipe.transformer) as cost:
        pipe(...)
    cost.flops, cost.block_calls

Work counts only inside the transformer's forward, and only if done: a block that a cache skips costs nothing. Counting
slows a run down, so it is never part of a timing.
"""

import functools
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: members of its own ModuleLists, in the order declared."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]


def attention_of(blocks: list[nn.Module]) -> list[nn.Module]:
    """The attention modules of the blocks, by name (attn, attn1, attn2, self_attn, ...)."""
    return [child for block in blocks for name, child in block.named_children() if "attn" in name]


def _cpu_attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of attention: 2 b h s_q s_k d for the scores and as many for the values; shapes (b, h, s, d)."""
    return sdpa_flop_count(query, key, value)


# torch 2.13 knows the fused attention kernels of CUDA only and would count those of the CPU as free.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


class _OneModule:
    """Stands in for torch's module tracker: one total, not one a module. It is faster, and it works where the
    tracker recurses without end, as on cache-dit's blocks, which hold the transformer that holds them."""

    parents = ("Global",)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class CallCounter:
    """Count runs of a module's own forward, under whatever hooks wrap it, now or later.

    diffusers' `HookRegistry` replaces `module.forward` and keeps the original in its innermost hook, which a cache
    does not call when it skips the module. So the count sits there.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.calls = 0
        owner, attribute = self._slot()
        self._original = getattr(owner, attribute)
        self._in_instance = attribute in vars(owner)
        self._removed = False

        @functools.wraps(self._original)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls += not self._removed
            return self._original(*args, **kwargs)

        self._counting = counting
        setattr(owner, attribute, counting)

    def _slot(self) -> tuple[Any, str]:
        """Where the module's own forward is: in the innermost diffusers hook, or in the module."""
        registry = getattr(self.module, "_diffusers_hook", None)
        if registry is None or not registry._fn_refs:
            return self.module, "forward"
        innermost = registry._fn_refs[0]
        return innermost, "forward" if innermost.original_forward is None else "original_forward"

    def remove(self) -> None:
        """Put the original back; a wrapper that is not diffusers' stays, inert."""
        self._removed = True
        owner, attribute = self._slot()
        if getattr(owner, attribute) is not self._counting:
            return
        if owner is self.module and not self._in_instance:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, self._original)


class TransformerCost:
    """Context manager that counts everything `transformer` does inside it.

    Attributes, final when the context is left:
        flops: floating point operations of matrix products, convolutions and attention (a product of m x k and
            k x n is 2 m k n), as `torch.utils.flop_counter` counts them; elementwise work is not counted.
        transformer_calls: runs of the transformer's own forward.
        block_calls: runs of the blocks' own forwards.
        attention_calls: runs of the blocks' attention modules; caches of attention outputs skip only these.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.flops = 0
        self._own_counters: list[CallCounter] = []
        self._block_counters: list[CallCounter] = []
        self._attention_counters: list[CallCounter] = []
        self._undo: Callable[[], None] = lambda: None

    @property
    def transformer_calls(self) -> int:
        return sum(counter.calls for counter in self._own_counters)

    @property
    def block_calls(self) -> int:
        return sum(counter.calls for counter in self._block_counters)

    @property
    def attention_calls(self) -> int:
        return sum(counter.calls for counter in self._attention_counters)

    def __enter__(self) -> Self:
        blocks = blocks_of(self.transformer)
        self._own_counters = [CallCounter(self.transformer)]
        self._block_counters = [CallCounter(block) for block in blocks]
        self._attention_counters = [CallCounter(module) for module in attention_of(blocks)]
        forward = self.transformer.forward
        in_instance = "forward" in vars(self.transformer)

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            mode = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            mode.mod_tracker = cast(ModuleTracker, _OneModule())
            with mode:
                output = forward(*args, **kwargs)
            self.flops += mode.get_total_flops()
            return output

        def undo() -> None:
            if in_instance:
                self.transformer.forward = forward
            else:
                del self.transformer.forward

        # Outside whatever is attached already: a cache that skips the whole transformer within its forward
        # adds nothing, and one that replaces the transformer's call does not come here at all.
        self.transformer.forward = counted
        self._undo = undo
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()
        for counter in (*self._attention_counters, *self._block_counters, *self._own_counters):
            counter.remove()


def compute_fraction(run: TransformerCost, uncached: TransformerCost) -> float:
    """FLOPs of a run as a fraction of those of the uncached run of the same prompt.

    Raises:
        ValueError: the uncached run counted nothing.
    """
    if uncached.flops <= 0:
        raise ValueError("the uncached run counted no FLOPs: was it inside TransformerCost?")
    return run.flops / uncached.flops
