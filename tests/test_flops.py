"""FLOPs against products written out, and counts of blocks that hooks skip."""

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from tiny_flux import NUM_BLOCKS, NUM_STEPS, call, flux_pipeline
from torch import Tensor, nn

from compare.flops import TransformerCost, attention_of, blocks_of, compute_fraction

TOKENS, CHANNELS, HEADS = 7, 8, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden: Tensor) -> Tensor:
        values = self.attn(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (n, heads, tokens, channels)
        mixed = nn.functional.scaled_dot_product_attention(values, values, values)
        return mixed.transpose(1, 2).flatten(-2)


class Toy(nn.Module):
    """Three blocks; each is 2 T C^2 FLOPs of projection and 4 T^2 C of attention an item."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


BLOCK_FLOPS = 2 * TOKENS * CHANNELS**2 + 4 * TOKENS**2 * CHANNELS


class Skip(ModelHook):
    def new_forward(self, module: nn.Module, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture
def hidden() -> Tensor:
    return torch.ones(2, TOKENS, CHANNELS)


def skip_second(toy: Toy) -> HookRegistry:
    registry = HookRegistry.check_if_exists_or_initialize(toy.blocks[1])
    registry.register_hook(Skip(), "skip")
    return registry


def test_flops_are_those_of_the_products_attention_included(hidden):
    toy = Toy()
    with torch.no_grad(), TransformerCost(toy) as cost:
        toy(hidden)
        torch.ones(50, 50) @ torch.ones(50, 50)  # not the transformer's
        toy(hidden)
    assert cost.flops == 2 * 2 * 3 * BLOCK_FLOPS  # two calls, a batch of two, three blocks
    assert (cost.transformer_calls, cost.block_calls, cost.attention_calls) == (2, 6, 6)


@pytest.mark.parametrize("hook_first", [True, False])
def test_a_block_that_a_hook_skips_is_not_counted(hidden, hook_first):
    toy = Toy()
    with TransformerCost(toy) as uncached:
        toy(hidden)
    if hook_first:
        skip_second(toy)
    with TransformerCost(toy) as cost:
        if not hook_first:
            skip_second(toy)
        toy(hidden)
    assert cost.block_calls == 2
    assert compute_fraction(cost, uncached) == pytest.approx(2 / 3)


def test_nothing_stays_behind(hidden):
    toy = Toy()
    before = [dict(vars(module)) for module in toy.modules()]
    with TransformerCost(toy):
        toy(hidden)
    assert [dict(vars(module)) for module in toy.modules()] == before
    registry = skip_second(toy)
    with TransformerCost(toy) as cost:
        toy(hidden)
    registry.remove_hook("skip")
    toy(hidden)
    assert cost.block_calls == 2  # of the counted call, not of the one after it


def test_an_exception_leaves_the_transformer_as_it_was():
    toy = Toy()
    with pytest.raises(RuntimeError), TransformerCost(toy):
        toy(torch.ones(1, 1, CHANNELS + 1))
    assert "forward" not in vars(toy)
    assert "forward" not in vars(toy.blocks[0])


def test_a_run_without_flops_has_no_fraction():
    cost = TransformerCost(Toy())
    with pytest.raises(ValueError, match="no FLOPs"):
        compute_fraction(cost, cost)


def test_a_pipeline_costs_its_steps():
    pipe = flux_pipeline()
    assert len(blocks_of(pipe.transformer)) == len(attention_of(blocks_of(pipe.transformer))) == NUM_BLOCKS
    plain = call(pipe)
    with TransformerCost(pipe.transformer) as full:
        counted = call(pipe)
    with TransformerCost(pipe.transformer) as half:
        call(pipe, num_inference_steps=NUM_STEPS // 2)
    assert torch.equal(plain, counted)
    assert full.block_calls == NUM_BLOCKS * NUM_STEPS
    assert compute_fraction(half, full) == 0.5
