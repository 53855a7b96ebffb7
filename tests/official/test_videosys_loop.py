"""VideoSys: `git clone https://github.com/NUS-HPC-AI-Lab/VideoSys -b v2.0.1`, then ERTACACHE_VIDEOSYS=its folder."""

import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from checked_loop import PROMPTS, check_loop
from stand_ins import stand_in
from torch import nn

import ertacache
from ertacache.errors import MismatchError
from ertacache.official.loops import EulerLoop

CHECKOUT = os.environ.get("ERTACACHE_VIDEOSYS")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="set ERTACACHE_VIDEOSYS to a checkout of VideoSys v2.0.1")


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0, **_):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture(scope="module")
def videosys():
    """RFLOW as the Open-Sora pipeline makes it, and a small STDiT3 on one GPU's parallel manager."""
    stand_in("colossalai", "imageio", "omegaconf", "timm", "torchvision")
    import timm.models.layers
    import timm.models.vision_transformer

    timm.models.vision_transformer.Mlp = Mlp
    timm.models.layers.DropPath = lambda *_: nn.Identity()
    for name in ("videosys", "videosys.models", "videosys.models.transformers", "videosys.schedulers"):
        package = types.ModuleType(name)  # their own import every pipeline
        package.__path__ = [str(Path(CHECKOUT, *name.split(".")))]
        sys.modules[name] = package
    sys.modules["videosys.core.parallel_mgr"] = mock.MagicMock()
    from videosys.models.transformers.open_sora_transformer_3d import STDiT3, STDiT3Config
    from videosys.schedulers.scheduling_rflow_open_sora import RFLOW

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 6}
    model = STDiT3(STDiT3Config(**sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    for part in model.modules():
        if hasattr(part, "parallel_manager"):
            part.parallel_manager = types.SimpleNamespace(dp_size=1, cp_size=1, sp_size=1)
    return RFLOW(num_sampling_steps=20, cfg_scale=4.0, use_timestep_transform=True), model


def test_calibrated_and_run_where_it_is(videosys):
    scheduler, model = videosys

    def sample(model, prompt, seed):
        arguments = {name: torch.tensor([64.0]) for name in ("height", "width")}
        arguments |= {"num_frames": torch.tensor([17]), "fps": torch.tensor([24.0]), "mask": torch.ones(1, 6).long()}
        text = torch.randn(1, 1, 6, 16, generator=torch.Generator().manual_seed(sum(prompt.encode())))
        z = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(seed))
        return scheduler.sample(model, z, {"y": text, **arguments}, torch.zeros_like(text), "cpu", progress=False)

    pipe = types.SimpleNamespace(transformer=model, scheduler=scheduler)
    loop = EulerLoop(model, sample, torch.sigmoid, guidance_scale=4.0)
    made, _ = check_loop("videosys", model, loop, sample)
    with pytest.raises(MismatchError, match=r"RFLOW .*\.transformer"):
        ertacache.apply(pipe, made)
    with pytest.raises(MismatchError, match=r"RFLOW .*\.transformer"):
        ertacache.calibrate(pipe, PROMPTS, computed_steps=10)
