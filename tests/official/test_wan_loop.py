"""The official wan package: `git clone https://github.com/Wan-Video/Wan2.1`, then ERTACACHE_WAN=its folder.

A small WanModel with the tiny pipeline's weights, or random ones, in `WanT2V.generate` itself, on the CPU.
"""

import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from stand_ins import stand_in

import ertacache
from ertacache.metrics import psnr
from ertacache.official.loops import wan

CHECKOUT = os.environ.get("ERTACACHE_WAN")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="set ERTACACHE_WAN to a checkout of Wan-Video/Wan2.1")
STEPS = 20
ARGUMENTS = {"size": (64, 64), "frame_num": 5, "sampling_steps": STEPS, "guide_scale": 4.0, "offload_model": False}
PROMPTS = ["a red ring", "two blue discs", "a green square", "a small star"]


def attention(q, k, v, *_, **__):
    """What the package's own attention gives, which asks for CUDA."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Text:
    """Texts (tokens, 16) by their letters, in the shape of the package's encoder."""

    def __call__(self, texts, device):
        return [torch.randn(6, 16, generator=torch.Generator().manual_seed(sum(t.encode()))) for t in texts]


class VAE:
    """Eight pixels along a side of a latent, four frames to one; the first channels are the colours."""

    model = types.SimpleNamespace(z_dim=16)

    def decode(self, latents):
        return [z[:3].repeat_interleave(8, -1).repeat_interleave(8, -2).repeat_interleave(2, 1).tanh() for z in latents]


@pytest.fixture(scope="module")
def package():
    """A WanT2V without its constructor, which loads 15 GB onto a GPU."""
    sys.path.insert(0, str(Path(CHECKOUT)))
    stand_in("torchvision")
    with mock.patch.object(torch.cuda, "current_device", lambda: 0):  # a default argument of the text encoder
        from wan.modules import model as network
        from wan.text2video import WanT2V

    torch.manual_seed(0)
    small = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 16, "num_heads": 4, "num_layers": 2, "text_len": 8}
    model = network.WanModel(**small).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    made = WanT2V.__new__(WanT2V)
    made.device, made.rank, made.t5_cpu, made.sp_size = torch.device("cpu"), 0, True, 1
    made.num_train_timesteps, made.param_dtype = 1000, torch.float32
    made.vae_stride, made.patch_size, made.sample_neg_prompt = (4, 8, 8), (1, 2, 2), ""
    made.text_encoder, made.vae, made.model = Text(), VAE(), model
    with mock.patch.object(network, "flash_attention", attention):
        yield made


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_calibrated_and_run_where_it_is(package, solver):
    def generate():
        return package.generate("a blue ring", seed=9, sample_solver=solver, **ARGUMENTS)

    reference = generate()
    loop, before = wan(package, solver), dict(vars(sys.modules["wan.text2video"]))
    goal = {"seeds": range(4), "computed_steps": 10, "progress": False}
    calibration = ertacache.calibrate(loop, PROMPTS, **goal, **ARGUMENTS)
    assert vars(sys.modules["wan.text2video"]) == before and "decode" not in vars(package.vae)
    assert torch.equal(generate(), reference)
    every = ertacache.calibrate(loop, PROMPTS[:1], computed_steps=STEPS, progress=False, **ARGUMENTS)
    with ertacache.apply(package.model, every):  # its own class: no `converted`
        assert torch.equal(generate(), reference)
    with ertacache.apply(package.model, calibration) as applied:
        alone = generate()
    assert (applied.computed_calls, applied.reused_calls) == (20, 20)
    with ertacache.apply(loop, calibration):
        guided = loop("a blue ring", torch.Generator().manual_seed(9), **ARGUMENTS)[0][0]
    pixels = [(video.transpose(0, 1) / 2 + 0.5).clamp(0, 1) for video in (reference, alone)]
    print(f"{solver}: {float(psnr(pixels[1][None], pixels[0][None])):.2f} dB to uncached", end=", ")
    print(f"model alone to adapter {float((pixels[1] - guided).abs().max()):.1e}")
    assert torch.allclose(pixels[1], guided, atol=1e-4)
    assert float(psnr(pixels[1][None], pixels[0][None])) > 30
