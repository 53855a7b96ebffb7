"""`ertacache.explain` and `ertacache doctor` say what a pipeline's call is made of."""

import diffusers
import pytest
import torch
from builders import LTX2, PIXART, SIZE, Case, flux, flux_controlnet, ltx2, picture, pixart
from cases import ROOT, TRUE_CFG, sample
from test_faults import FirstBlockCacheConfig

import ertacache
from ertacache.cli import inspect


def test_it_says_grid_latents_guidance_and_networks_and_leaves_the_pipeline_as_it_was():
    case = Case(flux("FluxImg2ImgPipeline"), {**SIZE, "image": picture(0), "strength": 0.5})
    reference, before = sample(case), set(vars(case.pipe))
    said = ertacache.explain(case.pipe, "a photo", num_inference_steps=8, **case.arguments)
    assert "4 steps, timesteps 750 to 300, from step 4 of 8 on" in said and "[16, 16]" in said
    assert "1 samples" in said and "it can be" in said and len(said.splitlines()) < 20
    assert torch.equal(sample(case), reference) and set(vars(case.pipe)) == before
    assert "2 samples" in ertacache.explain(flux(), "a", **SIZE, **TRUE_CFG)


def test_it_names_every_network_and_all_latents():
    said = ertacache.explain(
        flux("FluxControlNetPipeline", controlnet=flux_controlnet()), "a", control_image=picture(1), **SIZE
    )
    assert "controlnet (FluxControlNetModel" in said
    assert "[32, 4] and [3, 4]" in ertacache.explain(ltx2(), "a", **LTX2)


def test_it_says_why_a_pipeline_cannot_be_calibrated():
    pipe = pixart(scheduler=diffusers.DDIMScheduler())
    assert "cannot be: step 0 of DDIMScheduler" in ertacache.explain(pipe, "a", **PIXART)
    assert "unexpected keyword argument 'heigt'" in ertacache.explain(flux(), "a", heigt=3)
    pipe = flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    assert "another cache is on" in ertacache.explain(pipe, "a", **SIZE)


def test_the_doctor_reads_a_folder(capsys):
    folder = str(ROOT / "ERTACache4Wan2.1" / "tiny")
    assert (
        inspect.main(
            [
                "doctor",
                folder,
                "--prompt",
                "a red circle",
                "--arguments",
                '{"height": 32, "width": 32, "num_frames": 5}',
            ]
        )
        == 0
    )
    assert "WanTransformer3DModel" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--arguments", "{"], ["--arguments", "[]"]], ids=str)
def test_the_doctor_refuses_what_it_cannot_read_in_one_line(wrong, capsys):
    assert inspect.main(["doctor", str(ROOT), *wrong]) == 2
    assert inspect.main(["doctor", str(ROOT)]) == 2
    assert capsys.readouterr().err.count("error:") == 2
