"""Skip the blocks of a transformer as one stack: hidden states in, hidden states out.

Uses diffusers' `TransformerBlockMetadata` (which argument and which returned value are the hidden states), so no model
is named here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

from compare.flops import blocks_of
from compare.rivals.base import NotApplicable, bound_arguments

HOOK_NAME = "ertacache_rival_stack"


class StackObserver(Protocol):
    """Observer that decides at the first block and sees the result at the last."""

    def enter(self, arguments: dict[str, Any]) -> Tensor | None:
        """Return what the stack returns for the first block's `arguments`; None to compute it."""

    def leave(self, hidden_in: Tensor, hidden_out: Tensor) -> None:
        """See hidden states (n, tokens, channels) before and after a computed stack."""


class _Shared:
    """State that the hooks of one stack share during one call of the transformer."""

    def __init__(self, observer: StackObserver):
        self.observer = observer
        self.skipping = False
        self.hidden_in: Tensor = torch.empty(0)  # of the first block, before it runs


class _BlockHook(ModelHook):
    """Hook registered like those of diffusers' own caches, so counting blocks sees which were skipped."""

    def __init__(self, shared: _Shared, metadata: TransformerBlockMetadata, is_first: bool, is_last: bool):
        super().__init__()
        self.shared, self.metadata = shared, metadata
        self.is_first, self.is_last = is_first, is_last

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shared = self.shared
        arguments = bound_arguments(module, args, kwargs)
        hidden = arguments[self.metadata.hidden_states_argument_name]
        if self.is_first:
            result = shared.observer.enter(arguments)
            shared.hidden_in, shared.skipping = hidden, result is not None
            hidden = hidden if result is None else result
        if shared.skipping:
            return self._pass_through(hidden, arguments)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.is_last:
            index = self.metadata.return_hidden_states_index
            shared.observer.leave(shared.hidden_in, output[index] if isinstance(output, tuple) else output)
        return output

    def _pass_through(self, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """Return the hidden states where the block would, the text's as they came in."""
        text_index = self.metadata.return_encoder_hidden_states_index
        if text_index is None:
            return hidden
        output: list[Any] = [None, None]
        output[self.metadata.return_hidden_states_index] = hidden
        output[text_index] = arguments[self.metadata.encoder_hidden_states_argument_name]
        return tuple(output)


@contextmanager
def intercepted(transformer: nn.Module, observer: StackObserver) -> Iterator[None]:
    """Let `observer` decide, call by call, whether the transformer's block stack runs.

    Raises:
        NotApplicable: diffusers does not know a block's class.
    """
    blocks = blocks_of(transformer)
    shared = _Shared(observer)
    try:
        known = [TransformerBlockRegistry.get(type(block)) for block in blocks]
    except ValueError as error:
        raise NotApplicable(f"diffusers does not know what this model's blocks return: {error}") from error
    registered: list[HookRegistry] = []
    try:
        for i, (block, metadata) in enumerate(zip(blocks, known, strict=True)):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            registry.register_hook(_BlockHook(shared, metadata, i == 0, i == len(blocks) - 1), HOOK_NAME)
            registered.append(registry)
        yield
    finally:
        for registry in registered:
            registry.remove_hook(HOOK_NAME, recurse=False)
