"""The official flux: `git clone https://github.com/black-forest-labs/flux`, then ERTACACHE_FLUX=its folder."""

import os
import sys
from pathlib import Path

import pytest
import torch
from checked_loop import check_loop
from stand_ins import stand_in

import ertacache
from ertacache.official.loops import EulerLoop

CHECKOUT = os.environ.get("ERTACACHE_FLUX")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="set ERTACACHE_FLUX to a checkout of black-forest-labs/flux")
SMALL = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 16,
    "hidden_size": 48,
    "num_heads": 4,
}
SMALLER = {"mlp_ratio": 2.0, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 4, 4], "theta": 10000}


@pytest.fixture(scope="module")
def flux():
    """The package's sampling module, and a small model of its class."""
    sys.path.insert(0, str(Path(CHECKOUT, "src")))
    stand_in("cv2", "imwatermark")
    import flux.sampling as sampling
    from flux.model import Flux, FluxParams

    torch.manual_seed(0)
    model = Flux(FluxParams(**SMALL, **SMALLER, qkv_bias=True, guidance_embed=True)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return sampling, model


def test_calibrated_and_run_where_it_is(flux):
    sampling, model = flux

    def sample(model, prompt, seed, steps=20):
        noise = torch.Generator().manual_seed(seed)
        text = torch.Generator().manual_seed(sum(prompt.encode()))
        ids = torch.zeros(1, 16, 3)
        ids[..., 1], ids[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4
        return sampling.denoise(
            model,
            img=torch.randn(1, 16, 16, generator=noise),
            img_ids=ids,
            txt=torch.randn(1, 5, 16, generator=text),
            txt_ids=torch.zeros(1, 5, 3),
            vec=torch.randn(1, 16, generator=text),
            timesteps=sampling.get_schedule(steps, 16),
        )

    loop = EulerLoop(model, sample, torch.sigmoid)
    made, alone = check_loop("flux", model, loop, sample)
    assert max(made.timesteps) == 1.0
    scaled = ertacache.Calibration(**{**vars(made), "timesteps": [1000 * t for t in made.timesteps]})
    with ertacache.apply(model, scaled):  # as diffusers counts
        assert torch.equal(sample(model, "a cube", 9), alone)
