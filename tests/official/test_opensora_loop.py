"""Open-Sora 1.2: `git clone https://github.com/hpcaitech/Open-Sora -b v1.2.0`, then ERTACACHE_OPENSORA=its folder."""

import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from checked_loop import check_loop
from stand_ins import stand_in
from torch import nn

from ertacache.official.loops import EulerLoop

CHECKOUT = os.environ.get("ERTACACHE_OPENSORA")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="set ERTACACHE_OPENSORA to a checkout of Open-Sora v1.2.0")
ABSENT = ("apex", "bs4", "colossalai", "mmengine", "pandarallel", "timm", "torchvision", "xformers")


class Registry:
    """mmengine's, as far as the modules are registered at import."""

    def __init__(self, *_, **__):
        pass

    def register_module(self, *_, **__):
        return lambda kind: kind


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0, **_):
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(in_features, hidden_features),
            act_layer(),
            nn.Linear(hidden_features, in_features),
        )

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Text:
    """Captions (n, 1, 6, 16) by their letters."""

    def encode(self, prompts):
        made = [torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(sum(p.encode()))) for p in prompts]
        return {"y": torch.stack(made), "mask": torch.ones(len(prompts), 6, dtype=torch.long)}

    def null(self, n):
        return torch.zeros(n, 1, 6, 16)


def attention_by_torch(self, x, cond, mask=None):
    """What xformers gives the cross attention, for a batch whose captions are all of one length."""
    b, n, c = x.shape
    q = self.q_linear(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
    k, v = self.kv_linear(cond).view(b, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


@pytest.fixture(scope="module")
def opensora():
    """RFLOW as the released configuration makes it, and a small STDiT3."""
    sys.path.insert(0, str(Path(CHECKOUT)))
    stand_in(*ABSENT)
    import mmengine.registry
    import timm.models.layers
    import timm.models.vision_transformer

    mmengine.registry.Registry, timm.models.vision_transformer.Mlp = Registry, Mlp
    timm.models.layers.DropPath = lambda *_: nn.Identity()
    # the packages' own __init__ import everything that Open-Sora trains with
    for name in ("opensora.models", "opensora.models.stdit", "opensora.models.layers", "opensora.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(CHECKOUT, *name.split(".")))]
        sys.modules[name] = package
    sys.modules["opensora.utils.ckpt_utils"] = mock.MagicMock()
    from opensora.models.layers import blocks
    from opensora.models.stdit import stdit3
    from opensora.schedulers.rf import RFLOW

    torch.manual_seed(0)
    config = stdit3.STDiT3Config(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=6)
    with mock.patch.object(blocks.MultiHeadCrossAttention, "forward", attention_by_torch):
        model = stdit3.STDiT3(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
        yield RFLOW(num_sampling_steps=20, cfg_scale=4.0, use_timestep_transform=True), model


def test_calibrated_and_run_where_it_is(opensora):
    scheduler, model = opensora
    size = {"height": torch.tensor([64.0]), "width": torch.tensor([64.0]), "num_frames": torch.tensor([17])}

    def sample(model, prompt, seed):
        z = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(seed))
        arguments = {**size, "fps": torch.tensor([24.0]), "ar": torch.tensor([1.0])}
        return scheduler.sample(model, Text(), z, [prompt], "cpu", additional_args=arguments, progress=False)

    loop = EulerLoop(model, sample, torch.sigmoid, guidance_scale=4.0)
    check_loop("opensora", model, loop, sample)
