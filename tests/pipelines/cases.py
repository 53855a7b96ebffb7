"""The pipelines that the table in docs/pipelines.md is made of, and the check that all of them pass. Holds no test.

`python tests/pipelines/cases.py` writes the page anew.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from builders import (
    LTX2,
    PIXART,
    SIZE,
    SPRINT,
    VIDEO,
    WAN,
    Case,
    dit,
    embedded,
    flux,
    flux2,
    flux_controlnet,
    framepack,
    ltx,
    ltx2,
    modular_flux,
    photo,
    picture,
    pixart,
    qwen,
    qwen21,
    sana_sprint,
    sd3,
    wan,
    z_image,
)
from torch import Tensor

import ertacache
from ertacache.errors import ERTACacheError
from ertacache.fit.runs import pixels_of
from ertacache.metrics import psnr

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pipelines.md"
STEPS, COMPUTED, PROMPTS = 6, 3, ("a red fox", "a blue boat", "two cups of tea")
LOSS = 1.0  # dB, that one prompt may lose to plain reuse by chance


@dataclass(frozen=True)
class Row:
    """A pipeline in the table.

    Attributes:
        make: builds its `Case`.
        call: what calibrates it, as one writes it: arguments after `pipe, prompts`.
        special: what to know.
    """

    make: Callable[[], Case]
    call: str = ""
    special: str = ""


def _images(count: int) -> dict[str, list[Any]]:
    return {"image": [picture(i) for i in range(count)]}


def _embeds(count: int) -> dict[str, list[Any]]:
    return {
        "prompt_embeds": list(embedded([str(i) for i in range(count)], 5, 12).split(1)),
        "pooled_prompt_embeds": list(embedded([str(i) for i in range(count)], 8).split(1)),
    }


IMAGE = 'per_prompt={"image": images}'
MIDDLE = "starts in the middle of the grid: for one `strength`"
MASK = {"mask_image": torch.ones(1, 1, 16, 16)}
GUIDED = {"guidance_scale": 4.0}
TRUE_CFG = {"negative_prompt": "dull", "true_cfg_scale": 4.0}
SQUARE = {"height": 32, "width": 32}
EXPERTS = {**WAN, **GUIDED, "guidance_scale_2": 3.0}
SKIPPED = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.9}

ROWS: dict[str, Row] = {
    "Flux2Pipeline": Row(lambda: Case(flux2("Flux2Pipeline"), SIZE)),
    "Flux2KleinPipeline": Row(lambda: Case(flux2("Flux2KleinPipeline"), {**SIZE, "guidance_scale": 3.0})),
    "Flux2KleinKVPipeline": Row(
        lambda: Case(flux2(), {**SIZE, "image": photo(64)}),
        "image=image",
        "fills a key-value cache at step 0",
    ),
    "QwenImagePipeline": Row(
        lambda: Case(qwen(), {**SIZE, **TRUE_CFG}),
        'negative_prompt=" ", true_cfg_scale=4.0',
        "guided by `true_cfg_scale` with a negative prompt only",
    ),
    "QwenImage21Pipeline": Row(
        lambda: Case(qwen21(), {"height": 32, "width": 32, **TRUE_CFG}),
        'negative_prompt=" ", true_cfg_scale=4.0',
        "fills a key-value cache at step 0",
    ),
    "ZImagePipeline": Row(lambda: Case(z_image(), {**SIZE, **GUIDED}), "guidance_scale=4.0", "lists of tensors"),
    "QwenImageImg2ImgPipeline": Row(
        lambda: Case(qwen("QwenImageImg2ImgPipeline"), {**SIZE, **TRUE_CFG, "strength": 0.9}, _images),
        f'{IMAGE}, strength=0.9, negative_prompt=" ", true_cfg_scale=4.0',
        MIDDLE,
    ),
    "ZImageInpaintPipeline": Row(
        lambda: Case(z_image("ZImageInpaintPipeline"), {**SIZE, **GUIDED, **MASK, "strength": 0.9}, _images),
        f"{IMAGE}, mask_image=mask, strength=0.9",
        MIDDLE,
    ),
    "ZImageImg2ImgPipeline": Row(
        lambda: Case(z_image("ZImageImg2ImgPipeline"), {**SIZE, **GUIDED, "strength": 0.9}, _images),
        f"{IMAGE}, strength=0.9",
        MIDDLE,
    ),
    "WanPipeline": Row(lambda: Case(wan(), {**WAN, **GUIDED})),
    "WanPipeline (two experts)": Row(
        lambda: Case(wan(experts=True), EXPERTS),
        "guidance_scale=4.0, guidance_scale_2=3.0",
        "both transformers rest; `boundary_ratio` is compared",
    ),
    "LTX2Pipeline": Row(lambda: Case(ltx2(), LTX2), "", "video and audio, each with its own coefficients"),
    "LTXPipeline": Row(lambda: Case(ltx("LTXPipeline"), VIDEO)),
    "LTXConditionPipeline": Row(
        lambda: Case(ltx(), {**VIDEO, "image": picture(0, 32)}),
        "image=image",
        "tokens of the image move less than others",
    ),
    "HunyuanVideoFramepackPipeline": Row(
        lambda: Case(framepack(), {**SQUARE, "latent_window_size": 2, "num_frames": 5, "image": picture(0, 32)}),
        "image=image, num_frames=33",
        "calibrate one section; it serves all of them",
    ),
    "StableDiffusion3Pipeline": Row(lambda: Case(sd3(), {**SIZE, **GUIDED})),
    "StableDiffusion3Pipeline (skip-layer guidance)": Row(
        lambda: Case(sd3(), {**SIZE, **GUIDED, **SKIPPED}),
        "skip_guidance_layers=[7, 8, 9]",
        "calls of two batch sizes in a step",
    ),
    "StableDiffusion3Img2ImgPipeline": Row(
        lambda: Case(sd3("StableDiffusion3Img2ImgPipeline"), {**SIZE, **GUIDED, "strength": 0.9}, _images),
        f"{IMAGE}, strength=0.9",
        MIDDLE,
    ),
    "StableDiffusion3PAGPipeline": Row(
        lambda: Case(sd3("StableDiffusion3PAGPipeline", pag_applied_layers="blocks.1"), {**SIZE, **GUIDED}),
        "pag_scale=3.0",
    ),
    "FluxPipeline": Row(lambda: Case(flux(), SIZE)),
    "FluxPipeline (true CFG)": Row(
        lambda: Case(flux(), {**SIZE, **TRUE_CFG}), 'negative_prompt="dull", true_cfg_scale=4.0'
    ),
    "FluxImg2ImgPipeline": Row(
        lambda: Case(flux("FluxImg2ImgPipeline"), {**SIZE, "strength": 0.9}, _images),
        f"{IMAGE}, strength=0.9",
        MIDDLE,
    ),
    "FluxInpaintPipeline": Row(
        lambda: Case(flux("FluxInpaintPipeline"), {**SIZE, **MASK, "strength": 0.9}, _images),
        f"{IMAGE}, mask_image=mask, strength=0.9",
        MIDDLE,
    ),
    "FluxKontextPipeline": Row(
        lambda: Case(
            flux("FluxKontextPipeline"), {**SIZE, "image": picture(2), "_auto_resize": False, "max_area": 256}
        ),
        "image=image",
    ),
    "FluxControlNetImg2ImgPipeline": Row(
        lambda: Case(
            flux("FluxControlNetImg2ImgPipeline", controlnet=flux_controlnet()),
            {**SIZE, "control_image": picture(3), "strength": 0.9},
            _images,
        ),
        f"{IMAGE}, control_image=control, strength=0.9",
        MIDDLE,
    ),
    "FluxControlNetPipeline": Row(
        lambda: Case(
            flux("FluxControlNetPipeline", controlnet=flux_controlnet()), {**SIZE, "control_image": picture(3)}
        ),
        "control_image=image",
        "the ControlNet rests, too",
    ),
    "FluxModularPipeline": Row(
        lambda: Case(modular_flux(), SIZE, _embeds, prompts=False),
        "",
        "modular: a `PipelineState` comes back",
    ),
    "PixArtAlphaPipeline": Row(lambda: Case(pixart(), PIXART)),
    "PixArtSigmaPipeline": Row(lambda: Case(pixart("PixArtSigmaPipeline"), PIXART)),
    "SanaSprintPipeline": Row(
        lambda: Case(sana_sprint(), {**SPRINT, "intermediate_timesteps": None}), "", "stochastic"
    ),
    "DiTPipeline": Row(
        lambda: Case(dit(), {}, lambda count: {"class_labels": [[i] for i in range(count)]}, prompts=False),
        'None, per_prompt={"class_labels": [[207], [360]]}',
        "class labels in place of prompts",
    ),
}


def sample(case: Case, index: int = 7, **changes: Any) -> Tensor:
    """Pixels of a prompt that nothing was calibrated on."""
    own = {name: values[-1] for name, values in case.per_prompt(index + 1).items()}
    prompt = {"prompt": "a green hill"} if case.prompts else {}
    noise = torch.Generator().manual_seed(100 + index)
    torch.manual_seed(index)
    arguments = {"num_inference_steps": STEPS, "output_type": "pt", **case.arguments, **own, **prompt, **changes}
    with torch.no_grad():
        return pixels_of(case.pipe(generator=noise, **arguments)).float()


def calibrated(case: Case, **changes: Any) -> ertacache.Calibration:
    """A calibration of the case's pipeline for its arguments."""
    prompts = list(PROMPTS) if case.prompts else None
    asked = {"computed_steps": COMPUTED, "num_inference_steps": STEPS, "seeds": range(3), "progress": False}
    own = case.per_prompt(len(PROMPTS)) or None
    return ertacache.calibrate(case.pipe, prompts, per_prompt=own, **{**asked, **case.arguments, **changes})


def check(case: Case) -> None:
    """Assert that a pipeline is followed exactly, calibrated with gain, and left as it was."""
    reference = sample(case)
    made = calibrated(case)
    count = made.num_inference_steps
    plain = replace(made, coefficients=[[1.0]] * count)
    if made.streams:
        plain = replace(plain, streams=[{**stream, "coefficients": [[1.0]] * count} for stream in made.streams])
    with ertacache.apply(case.pipe, replace(plain, computed_steps=list(range(count)))):
        assert torch.equal(sample(case), reference), "not exact with every step computed"
    with ertacache.apply(case.pipe, plain):
        reused = sample(case)
    with ertacache.apply(case.pipe, made) as applied:
        found = sample(case)
        assert applied.reused_calls > 0
        broken_off(case)
        assert torch.equal(sample(case), found), "a run that broke off left something behind"
    assert torch.equal(sample(case), reference), "not as before"
    assert psnr(found, reference) > psnr(reused, reference) - LOSS
    assert made.predicted is not None and abs(made.predicted["psnr"] - float(psnr(found, reference))) < 8.0


class StopError(Exception):
    """Ends a run."""


def broken_off(case: Case) -> None:
    """A run that ends at its second call of the transformer that runs."""
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise StopError

    hook = case.pipe.transformer.register_forward_pre_hook(stop)
    with suppress(StopError):
        sample(case)
    hook.remove()


def page() -> str:
    """The text of docs/pipelines.md."""
    head = (Path(__file__).with_name("head.md")).read_text(encoding="utf-8")
    lines = ["| Pipeline | Calibrate with | To know |", "|---|---|---|"]
    for name, row in ROWS.items():
        call = f"`{row.call}`" if row.call else ""
        lines.append(f"| {name} | {call} | {row.special} |")
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    failed = []
    for title, entry in ROWS.items():
        try:
            check(entry.make())
        except (AssertionError, ERTACacheError) as error:
            failed.append(f"{title}: {error}")
    if failed:
        sys.exit("\n".join(failed))
    PAGE.write_text(page(), encoding="utf-8")
