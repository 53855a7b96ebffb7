"""The pipelines that the table in docs/pipelines.md is made of, and the check that all of them pass. Holds no test.

`python tests/pipelines/cases.py` writes the page anew.
"""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import builders as b
import diffusers
import pytest
import torch
from parts import SIDE, TOKENS, WIDTH, Case, clip, embedded, photo, picture
from torch import Tensor

import ertacache
from ertacache.errors import ERTACacheError
from ertacache.fit.runs import pixels_of
from ertacache.metrics import psnr

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pipelines.md"
STEPS, COMPUTED, PROMPTS = 6, 3, ("a red fox", "a blue boat", "two cups of tea")
LOSS = 1.0  # dB, that one prompt may lose to plain reuse by chance
SEEN = 60.0  # dB, above which all is the same


def own(**makers: Callable[[int], Any]) -> Callable[[int], dict[str, list[Any]]]:
    """For `Case.per_prompt`: what makes the argument of prompt i, by its name."""
    return lambda count: {name: [make(i) for i in range(count)] for name, make in makers.items()}


@dataclass(frozen=True)
class Row:
    """A pipeline in the table.

    Attributes:
        pipe: builds it.
        arguments: of every call.
        call: what calibrates it, as one writes it: arguments after `pipe, prompts`.
        special: what to know.
        per_prompt, prompts: as of `Case`.
        refused: what says that it cannot be calibrated.
    """

    pipe: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    call: str = ""
    special: str = ""
    per_prompt: Callable[[int], dict[str, list[Any]]] = lambda count: {}
    prompts: bool = True
    refused: str = ""

    def case(self) -> Case:
        return Case(self.pipe(), self.arguments, self.per_prompt, self.prompts)


SIZE, SQUARE, VIDEO, WAN = b.SIZE, b.SQUARE, b.VIDEO, b.WAN
GUIDED = {"guidance_scale": 4.0}
TRUE_CFG = {"negative_prompt": "dull", "true_cfg_scale": 4.0}
STRENGTH = {"strength": 0.9}
MASK = {"mask_image": torch.ones(1, 1, SIDE, SIDE)}
EXPERTS = {**WAN, **GUIDED, "guidance_scale_2": 3.0}
SKIPPED = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.9}
SPRINT = {**b.SPRINT, "intermediate_timesteps": None}
SANA = {**b.SPRINT, **GUIDED}
CONTROL = {"control_image": picture(3)}
HELIOS = {"height": 16, "width": 16, **GUIDED, "num_frames": 5, "num_latent_frames_per_chunk": 2}
HELIOS |= {"history_sizes": [4, 2, 1]}
UNGUIDED = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": 1.0}
UNGUIDED |= {"audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
EDM = diffusers.EDMEulerScheduler(sigma_max=80.0, final_sigmas_type="sigma_min")

IMAGE = 'per_prompt={"image": images}'
MIDDLE = "starts in the middle of the grid: for one `strength`"
CFG = 'negative_prompt=" ", true_cfg_scale=4.0'
TWICE = "makes two steps of its scheduler for each of the run"
RESTS = "the ControlNet rests, too"
FLUX_TEXT = {
    "prompt_embeds": lambda i: embedded(str(i), TOKENS, WIDTH),
    "pooled_prompt_embeds": lambda i: embedded(str(i), b.POOLED),
}

ROWS: dict[str, Row] = {
    # FLUX.2, Krea 2, Ideogram 4, Z-Image, Qwen-Image
    "Flux2Pipeline": Row(partial(b.flux2, "Flux2Pipeline"), SIZE),
    "Flux2KleinPipeline": Row(partial(b.flux2, "Flux2KleinPipeline"), {**SIZE, "guidance_scale": 3.0}),
    "Flux2KleinKVPipeline": Row(
        b.flux2, {**SIZE, "image": photo(64)}, "image=image", "fills a key-value cache at step 0"
    ),
    "Flux2KleinInpaintPipeline": Row(
        partial(b.flux2, "Flux2KleinInpaintPipeline"),
        {**SIZE, **GUIDED, "image": photo(16), "mask_image": photo(16, 6), "strength": 0.9},
        "image=image, mask_image=mask, strength=0.9",
        MIDDLE,
    ),
    "Krea2Pipeline": Row(b.krea2, {**SIZE, **GUIDED}),
    "Ideogram4Pipeline": Row(
        b.ideogram4,
        {**SIZE, "guidance_schedule": None, "guidance_scale": 4.0, "max_sequence_length": TOKENS},
        "guidance_scale=4.0, guidance_schedule=None",
        "`unconditional_transformer` rests, too",
    ),
    "ZImagePipeline": Row(b.z_image, {**SIZE, **GUIDED}, "guidance_scale=4.0", "lists of tensors"),
    "ZImageImg2ImgPipeline": Row(
        partial(b.z_image, "ZImageImg2ImgPipeline"),
        {**SIZE, **GUIDED, **STRENGTH},
        f"{IMAGE}, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "ZImageInpaintPipeline": Row(
        partial(b.z_image, "ZImageInpaintPipeline"),
        {**SIZE, **GUIDED, **MASK, **STRENGTH},
        f"{IMAGE}, mask_image=mask, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "ZImageControlNetPipeline": Row(
        lambda: b.z_image("ZImageControlNetPipeline", controlnet=b.z_image_controlnet()),
        {**SIZE, **GUIDED, **CONTROL},
        "control_image=image",
        RESTS,
    ),
    "QwenImagePipeline": Row(
        b.qwen, {**SIZE, **TRUE_CFG}, CFG, "guided by `true_cfg_scale` with a negative prompt only"
    ),
    "QwenImageImg2ImgPipeline": Row(
        partial(b.qwen, "QwenImageImg2ImgPipeline"),
        {**SIZE, **TRUE_CFG, **STRENGTH},
        f"{IMAGE}, strength=0.9, {CFG}",
        MIDDLE,
        own(image=picture),
    ),
    "QwenImageInpaintPipeline": Row(
        partial(b.qwen, "QwenImageInpaintPipeline"),
        {**SIZE, **TRUE_CFG, **MASK, **STRENGTH},
        f"{IMAGE}, mask_image=mask, strength=0.9, {CFG}",
        MIDDLE,
        own(image=picture),
    ),
    "QwenImageControlNetPipeline": Row(
        lambda: b.qwen("QwenImageControlNetPipeline", controlnet=b.qwen_controlnet()),
        {**SIZE, **TRUE_CFG, **CONTROL},
        f"control_image=image, {CFG}",
        RESTS,
    ),
    "QwenImageControlNetInpaintPipeline": Row(
        lambda: b.qwen("QwenImageControlNetInpaintPipeline", controlnet=b.qwen_controlnet(extra_condition_channels=4)),
        {**SIZE, **TRUE_CFG, **CONTROL, "control_mask": torch.ones(1, 1, SIDE, SIDE)},
        f"control_image=image, control_mask=mask, {CFG}",
        RESTS,
    ),
    "QwenImageEditPipeline": Row(
        partial(b.qwen_edit, "QwenImageEditPipeline"),
        {**SQUARE, **TRUE_CFG},
        f"{IMAGE}, {CFG}",
        "",
        own(image=partial(photo, 32)),
    ),
    "QwenImageEditInpaintPipeline": Row(
        partial(b.qwen_edit, "QwenImageEditInpaintPipeline"),
        {**SQUARE, **TRUE_CFG, **STRENGTH, "mask_image": photo(32, 6)},
        f"{IMAGE}, mask_image=mask, strength=0.9, {CFG}",
        MIDDLE,
        own(image=partial(photo, 32)),
    ),
    "QwenImageEditPlusPipeline": Row(
        partial(b.qwen_edit, "QwenImageEditPlusPipeline"),
        {**SQUARE, **TRUE_CFG},
        f"{IMAGE}, {CFG}",
        "takes one prompt a call",
        own(image=partial(photo, 32)),
    ),
    "QwenImageLayeredPipeline": Row(
        partial(b.qwen_edit, "QwenImageLayeredPipeline"),
        {"resolution": 640, "layers": 1, **TRUE_CFG},
        f"{IMAGE}, {CFG}",
        "",
        own(image=partial(photo, 32)),
    ),
    "QwenImage21Pipeline": Row(b.qwen21, {**SQUARE, **TRUE_CFG}, CFG, "fills a key-value cache at step 0"),
    "ErnieImagePipeline": Row(b.ernie, {**SIZE, **GUIDED}),
    "OvisImagePipeline": Row(partial(b.like_flux, "OvisImagePipeline", "eEiI", out_channels=16), {**SIZE, **GUIDED}),
    "LongCatImagePipeline": Row(
        partial(b.like_flux, "LongCatImagePipeline", "ei", in_channels=64),
        {**SIZE, **GUIDED, "enable_prompt_rewrite": False},
    ),
    "BriaPipeline": Row(partial(b.like_flux, "BriaPipeline", "eEi"), {**SIZE, **GUIDED}),
    "HunyuanImagePipeline": Row(b.hunyuan_image, {**SIZE}, "", "guided by its `guider`"),
    "PRXPipeline": Row(b.prx, {**SIZE, **GUIDED, "use_resolution_binning": False}),
    "GlmImagePipeline": Row(b.glm_image, {**SIZE, **GUIDED}, "", "the tokens that it writes first are made once"),
    # videos
    "WanPipeline": Row(b.wan, {**WAN, **GUIDED}),
    "WanPipeline (two experts)": Row(
        partial(b.wan, experts=True),
        EXPERTS,
        "guidance_scale=4.0, guidance_scale_2=3.0",
        "both transformers rest; `boundary_ratio` is compared",
    ),
    "WanPipeline (TI2V-5B)": Row(
        partial(b.wan, expand_timesteps=True), {**WAN, **GUIDED}, "", "a timestep for each token"
    ),
    "WanImageToVideoPipeline": Row(
        partial(b.wan, "WanImageToVideoPipeline", True, transformer={"in_channels": 12}),
        EXPERTS,
        f"{IMAGE}, guidance_scale_2=3.0",
        "",
        own(image=picture),
    ),
    "WanImageToVideoPipeline (TI2V-5B)": Row(
        partial(b.wan, "WanImageToVideoPipeline", expand_timesteps=True),
        {**WAN, **GUIDED},
        IMAGE,
        "the first frame is given",
        own(image=picture),
    ),
    "WanVideoToVideoPipeline": Row(
        partial(b.wan, "WanVideoToVideoPipeline"),
        {"height": 16, "width": 16, **GUIDED, **STRENGTH},
        'per_prompt={"video": videos}, strength=0.9',
        MIDDLE,
        own(video=lambda i: clip(16, 5, i)),
    ),
    "WanVACEPipeline": Row(
        partial(
            b.wan,
            "WanVACEPipeline",
            transformer_class="WanVACETransformer3DModel",
            transformer={"vace_layers": [0], "vace_in_channels": 2 * 4 + 4**2},
        ),
        {**WAN, **GUIDED},
        'per_prompt={"video": videos}',
        "takes one prompt a call",
        own(video=lambda i: clip(16, 5, i)),
    ),
    "WanAnimatePipeline": Row(
        b.wan_animate,
        {"height": 16, "width": 16, "segment_frame_length": 5},
        'per_prompt={"image": images, "pose_video": poses, "face_video": faces}',
        "calibrate one segment; it serves all of them",
        own(image=partial(photo, 16), pose_video=lambda i: clip(16, 5, i), face_video=lambda i: clip(16, 5, i + 9)),
    ),
    "Kandinsky6TI2VAPipeline": Row(
        b.kandinsky6, {**VIDEO, **GUIDED, "num_frames": 5, "sample_audio": True}, "", "video and audio"
    ),
    "Cosmos3OmniPipeline": Row(b.cosmos3, {**WAN, **GUIDED}, "", "takes one prompt a call"),
    "LTX2Pipeline": Row(b.ltx2, b.LTX2, "", "video and audio, each with its own coefficients"),
    "LTX2ImageToVideoPipeline": Row(
        partial(b.ltx2, "LTX2ImageToVideoPipeline"),
        {**VIDEO, "image_crf": 0, "use_cross_timestep": False, **UNGUIDED},
        IMAGE,
        "video and audio",
        own(image=partial(photo, 32)),
    ),
    "LTXPipeline": Row(partial(b.ltx, "LTXPipeline"), VIDEO),
    "LTXImageToVideoPipeline": Row(
        partial(b.ltx, "LTXImageToVideoPipeline"),
        VIDEO,
        IMAGE,
        "tokens of the image do not move",
        own(image=lambda i: picture(i, 32)),
    ),
    "LTXConditionPipeline": Row(
        b.ltx, {**VIDEO, "image": picture(0, 32)}, "image=image", "tokens of the image move less than others"
    ),
    "HunyuanVideo15Pipeline": Row(b.hunyuan15, VIDEO, "", "guided by its `guider`"),
    "HunyuanVideo15ImageToVideoPipeline": Row(
        b.hunyuan15_image,
        {"num_frames": 3},
        IMAGE,
        "guided by its `guider`",
        own(image=partial(photo, 32)),
    ),
    "HunyuanVideoPipeline": Row(b.hunyuan_video, VIDEO),
    "HunyuanVideoFramepackPipeline": Row(
        b.framepack,
        {**SQUARE, "latent_window_size": 2, "num_frames": 5, "image": picture(0, 32)},
        "image=image, num_frames=33",
        "calibrate one section; it serves all of them",
    ),
    "Kandinsky5T2VPipeline": Row(b.kandinsky5, {**VIDEO, **GUIDED}),
    "Kandinsky5T2IPipeline": Row(partial(b.kandinsky5, "Kandinsky5T2IPipeline"), {**SQUARE, **GUIDED}),
    "Kandinsky5I2VPipeline": Row(
        partial(b.kandinsky5, "Kandinsky5I2VPipeline"),
        {**SQUARE, **GUIDED, "num_frames": 21},
        IMAGE,
        "",
        own(image=partial(photo, 32)),
    ),
    "HeliosPipeline": Row(
        b.helios,
        HELIOS,
        "num_frames=33",
        "calibrate one chunk; it serves all of them",
    ),
    "SkyReelsV2Pipeline": Row(b.skyreels, {**WAN, **GUIDED}),
    "SkyReelsV2DiffusionForcingPipeline": Row(
        partial(b.skyreels, "SkyReelsV2DiffusionForcingPipeline"),
        {**WAN, **GUIDED},
        "",
        "each frame has its own coefficients",
    ),
    "SkyReelsV2DiffusionForcingPipeline (asynchronous)": Row(
        partial(b.skyreels, "SkyReelsV2DiffusionForcingPipeline"),
        {**WAN, **GUIDED, "ar_step": 2, "causal_block_size": 1},
        "ar_step=5",
        "frames are at different steps",
        refused="another scheduler begins at step 3 of the run",
    ),
    "SkyReelsV2ImageToVideoPipeline": Row(
        partial(
            b.wan,
            "SkyReelsV2ImageToVideoPipeline",
            transformer_class="SkyReelsV2Transformer3DModel",
            transformer={"in_channels": 12, "image_dim": WIDTH, "added_kv_proj_dim": 32},
            image_encoder=b.ImageEncoder(),
            image_processor=b.ImageEncoder(),
        ),
        {**WAN, **GUIDED},
        IMAGE,
        "",
        own(image=partial(photo, 16)),
    ),
    "SanaVideoPipeline": Row(b.sana_video, {**SANA, "frames": 5}),
    "CosmosTextToWorldPipeline": Row(
        partial(b.cosmos, "CosmosTextToWorldPipeline", EDM),
        {**WAN, **GUIDED},
        "",
        TWICE,
        refused="every step of the grid in order",
    ),
    "CosmosVideoToWorldPipeline": Row(
        partial(b.cosmos, "CosmosVideoToWorldPipeline", EDM, in_channels=5),
        {**WAN, **GUIDED},
        IMAGE,
        TWICE,
        own(image=picture),
        refused="every step of the grid in order",
    ),
    "Cosmos2TextToImagePipeline": Row(partial(b.cosmos, "Cosmos2TextToImagePipeline"), {**SIZE, **GUIDED}),
    "Cosmos2VideoToWorldPipeline": Row(
        partial(b.cosmos, "Cosmos2VideoToWorldPipeline", in_channels=5),
        {**WAN, **GUIDED},
        IMAGE,
        "",
        own(image=picture),
    ),
    "Cosmos2_5_PredictBasePipeline": Row(
        partial(b.cosmos, "Cosmos2_5_PredictBasePipeline", in_channels=5), {**WAN, **GUIDED}
    ),
    "CogVideoXPipeline": Row(b.cogvideox, {**b.COGVIDEO_CALL, **GUIDED}),
    "CogVideoXImageToVideoPipeline": Row(
        partial(b.cogvideox, "CogVideoXImageToVideoPipeline", in_channels=8),
        {**b.COGVIDEO_CALL, **GUIDED},
        IMAGE,
        "",
        own(image=picture),
    ),
    "CogVideoXVideoToVideoPipeline": Row(
        partial(b.cogvideox, "CogVideoXVideoToVideoPipeline"),
        {**SIZE, "max_sequence_length": TOKENS, **GUIDED, **STRENGTH},
        'per_prompt={"video": videos}, strength=0.9',
        MIDDLE,
        own(video=lambda i: clip(16, 5, i)),
    ),
    "MochiPipeline": Row(b.mochi, {**SQUARE, "num_frames": 7, **GUIDED, "max_sequence_length": TOKENS}),
    "AllegroPipeline": Row(b.allegro, {**SIZE, "num_frames": 8, **GUIDED, "clean_caption": False}),
    "EasyAnimatePipeline": Row(b.easyanimate, {**SQUARE, "num_frames": 5, **GUIDED}),
    "LattePipeline": Row(b.latte, {**SIZE, "video_length": 2, **GUIDED, "clean_caption": False}),
    # pictures
    "HiDreamImagePipeline": Row(b.hidream, {**SIZE, **GUIDED}),
    "ChromaPipeline": Row(b.chroma, {**SIZE, **GUIDED}),
    "ChromaImg2ImgPipeline": Row(
        partial(b.chroma, "ChromaImg2ImgPipeline"),
        {**SIZE, **GUIDED, **STRENGTH},
        f"{IMAGE}, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "CogView4Pipeline": Row(b.cogview4, {**SIZE, **GUIDED}),
    "CogView4ControlPipeline": Row(
        partial(b.cogview4, "CogView4ControlPipeline", in_channels=8),
        {**SIZE, **GUIDED, **CONTROL},
        "control_image=image",
    ),
    "CogView3PlusPipeline": Row(b.cogview3, {**SIZE, **GUIDED}),
    "Lumina2Pipeline": Row(b.lumina2, {**SQUARE, **GUIDED}),
    "LuminaPipeline": Row(b.lumina, {**SQUARE, **GUIDED, "clean_caption": False}),
    "AuraFlowPipeline": Row(b.aura_flow, {**SIZE, **GUIDED}),
    "OmniGenPipeline": Row(b.omnigen, {**SQUARE, "guidance_scale": 2.5}),
    "SanaPipeline": Row(b.sana, SANA),
    "SanaControlNetPipeline": Row(
        lambda: b.sana("SanaControlNetPipeline", controlnet=b.sana_controlnet()),
        {**SANA, **CONTROL},
        "control_image=image",
        RESTS,
    ),
    "SanaSprintPipeline": Row(b.sana_sprint, SPRINT, "", "stochastic"),
    "SanaSprintImg2ImgPipeline": Row(
        partial(b.sana, "SanaSprintImg2ImgPipeline"),
        {**SPRINT, **STRENGTH},
        f"{IMAGE}, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "StableDiffusion3Pipeline": Row(b.sd3, {**SIZE, **GUIDED}),
    "StableDiffusion3Pipeline (skip-layer guidance)": Row(
        b.sd3, {**SIZE, **GUIDED, **SKIPPED}, "skip_guidance_layers=[7, 8, 9]", "calls of two batch sizes in a step"
    ),
    "StableDiffusion3Img2ImgPipeline": Row(
        partial(b.sd3, "StableDiffusion3Img2ImgPipeline"),
        {**SIZE, **GUIDED, **STRENGTH},
        f"{IMAGE}, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "StableDiffusion3InpaintPipeline": Row(
        partial(b.sd3, "StableDiffusion3InpaintPipeline"),
        {**SIZE, **GUIDED, **STRENGTH, **MASK},
        f"{IMAGE}, mask_image=mask, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "StableDiffusion3ControlNetPipeline": Row(
        lambda: b.sd3("StableDiffusion3ControlNetPipeline", controlnet=b.sd3_controlnet()),
        {**SIZE, **GUIDED, **CONTROL},
        "control_image=image",
        RESTS,
    ),
    "StableDiffusion3PAGPipeline": Row(
        partial(b.sd3, "StableDiffusion3PAGPipeline", pag_applied_layers="blocks.1"),
        {**SIZE, **GUIDED},
        "pag_scale=3.0",
    ),
    "FluxPipeline": Row(b.flux, SIZE),
    "FluxPipeline (true CFG)": Row(b.flux, {**SIZE, **TRUE_CFG}, 'negative_prompt="dull", true_cfg_scale=4.0'),
    "FluxImg2ImgPipeline": Row(
        partial(b.flux, "FluxImg2ImgPipeline"),
        {**SIZE, **STRENGTH},
        f"{IMAGE}, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxInpaintPipeline": Row(
        partial(b.flux, "FluxInpaintPipeline"),
        {**SIZE, **MASK, **STRENGTH},
        f"{IMAGE}, mask_image=mask, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxFillPipeline": Row(
        partial(b.flux, "FluxFillPipeline", transformer={"in_channels": 2 * 16 + 16, "out_channels": 16}),
        {**SIZE, **MASK},
        f"{IMAGE}, mask_image=mask",
        "",
        own(image=picture),
    ),
    "FluxKontextPipeline": Row(
        partial(b.flux, "FluxKontextPipeline"),
        {**SIZE, "image": picture(2), "_auto_resize": False, "max_area": 256},
        "image=image",
    ),
    "FluxKontextInpaintPipeline": Row(
        partial(b.flux, "FluxKontextInpaintPipeline"),
        {**SIZE, **MASK, **STRENGTH, "_auto_resize": False, "max_area": 256},
        f"{IMAGE}, mask_image=mask, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxControlPipeline": Row(
        partial(b.flux, "FluxControlPipeline", transformer={"in_channels": 32, "out_channels": 16}),
        {**SIZE, **CONTROL},
        "control_image=image",
    ),
    "FluxControlImg2ImgPipeline": Row(
        partial(b.flux, "FluxControlImg2ImgPipeline", transformer={"in_channels": 32, "out_channels": 16}),
        {**SIZE, **CONTROL, **STRENGTH},
        f"{IMAGE}, control_image=control, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxControlInpaintPipeline": Row(
        partial(b.flux, "FluxControlInpaintPipeline", transformer={"in_channels": 32, "out_channels": 16}),
        {**SIZE, **CONTROL, **MASK, **STRENGTH},
        f"{IMAGE}, mask_image=mask, control_image=control, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxControlNetPipeline": Row(
        lambda: b.flux("FluxControlNetPipeline", controlnet=b.flux_controlnet()),
        {**SIZE, **CONTROL},
        "control_image=image",
        RESTS,
    ),
    "FluxControlNetImg2ImgPipeline": Row(
        lambda: b.flux("FluxControlNetImg2ImgPipeline", controlnet=b.flux_controlnet()),
        {**SIZE, **CONTROL, **STRENGTH},
        f"{IMAGE}, control_image=control, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxControlNetInpaintPipeline": Row(
        lambda: b.flux("FluxControlNetInpaintPipeline", controlnet=b.flux_controlnet()),
        {**SIZE, **CONTROL, **MASK, **STRENGTH},
        f"{IMAGE}, mask_image=mask, control_image=control, strength=0.9",
        MIDDLE,
        own(image=picture),
    ),
    "FluxModularPipeline": Row(
        b.modular_flux, SIZE, "", "modular: a `PipelineState` comes back", own(**FLUX_TEXT), prompts=False
    ),
    "PixArtAlphaPipeline": Row(b.pixart, b.PIXART),
    "PixArtSigmaPipeline": Row(partial(b.pixart, "PixArtSigmaPipeline"), b.PIXART),
    "HunyuanDiTPipeline": Row(b.hunyuan_dit, {**SIZE, **GUIDED, "use_resolution_binning": False}),
    "DiTPipeline": Row(
        b.dit,
        {},
        'None, per_prompt={"class_labels": [[207], [360]]}',
        "class labels in place of prompts",
        own(class_labels=lambda i: [i]),
        prompts=False,
    ),
}


def sample(case: Case, index: int = 7, **changes: Any) -> Tensor:
    """Pixels of a prompt that nothing was calibrated on, another one for each index."""
    own = {name: values[-1] for name, values in case.per_prompt(index + 1).items()}
    prompt = {"prompt": f"green hill {index}"} if case.prompts else {}  # prompts differ by decibels
    noise = torch.Generator().manual_seed(100 + index)
    arguments = {"num_inference_steps": STEPS, "output_type": "pt", **case.arguments, **own, **prompt, **changes}
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(index)
        return pixels_of(case.pipe(generator=noise, **arguments), 1).float()


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
    quality = float(psnr(found, reference))
    assert quality > psnr(reused, reference) - LOSS
    assert made.predicted is not None and abs(min(made.predicted["psnr"], SEEN) - min(quality, SEEN)) < 8.0


def refuses(case: Case, said: str) -> None:
    """Assert that a pipeline which cannot be calibrated is refused by a line that says why, and left as it was."""
    reference = sample(case)
    with pytest.raises(ERTACacheError, match=re.escape(said)):
        calibrated(case)
    assert torch.equal(sample(case), reference)


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
    works = ["| Pipeline | Calibrate with | To know |", "|---|---|---|"]
    refused = ["| Pipeline | Why | What calibration says |", "|---|---|---|"]
    for name, row in ROWS.items():
        call = f"`{row.call}`" if row.call else ""
        if row.refused:
            refused.append(f"| {name} | {row.special} | `...{row.refused}...` |")
        else:
            works.append(f"| {name} | {call} | {row.special} |")
    return head + "\n".join([*works, "", "Refused:", "", *refused]) + "\n"


def verify(row: Row) -> None:
    """Assert what the table says of a pipeline."""
    if row.refused:
        refuses(row.case(), row.refused)
    else:
        check(row.case())


if __name__ == "__main__":
    failed = []
    for title, entry in ROWS.items():
        try:
            verify(entry)
        except (AssertionError, ERTACacheError) as error:
            failed.append(f"{title}: {error}")
    if failed:
        sys.exit("\n".join(failed))
    PAGE.write_text(page(), encoding="utf-8")
