"""Tiny pipelines of diffusers with random weights, a builder for each kind of transformer. Holds no test."""

import functools
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from parts import (
    POOLED,
    SIDE,
    TOKENS,
    WIDTH,
    Case,
    Stub,
    Video,
    autoencoder,
    built,
    clip,
    embedded,
    encoding,
    model,
    photo,
    picture,
    text,
)
from torch import nn

__all__ = ["POOLED", "Case", "clip", "encoding", "photo", "picture"]

SIZE = {"height": SIDE, "width": SIDE}
SQUARE = {"height": 32, "width": 32}
VIDEO = {**SQUARE, "num_frames": 3}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# -- FLUX.1 and its kin --------------------------------------------------------------------------------------

FLUX = {"patch_size": 1, "in_channels": 16, "guidance_embeds": True}


def flux_transformer(seed: int = 0, **changes: Any) -> Any:
    return model("FluxTransformer2DModel", seed, **{**FLUX, "out_channels": None, **changes})


def flux(
    kind: str = "FluxPipeline", scheduler: Any = None, transformer: dict[str, Any] | None = None, **parts: Any
) -> Any:
    """One of FLUX.1's pipelines."""
    parts = {"vae": autoencoder(), "scheduler": scheduler, **parts}
    return built(kind, flux_transformer(**(transformer or {})), text("epi"), **parts)


def flux_controlnet(seed: int = 3) -> nn.Module:
    return model("FluxControlNetModel", seed, **FLUX)


def modular_flux() -> Any:
    """FLUX.1 as a modular pipeline without its text encoders: it is called with embeddings."""
    from diffusers.modular_pipelines.flux import FluxAutoBlocks

    blocks = FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe, parts = blocks.init_pipeline(), flux()
    pipe.update_components(transformer=parts.transformer, vae=parts.vae, scheduler=parts.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chroma(kind: str = "ChromaPipeline") -> Any:
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = model("ChromaTransformer2DModel", patch_size=1, in_channels=16, out_channels=None, **approximator)
    return built(kind, transformer, text("eibEIB"), vae=autoencoder())


def like_flux(kind: str, returns: str, **config: Any) -> Any:
    """Pipelines whose transformers take what FLUX's takes, but for the text."""
    config = {"patch_size": 1, "in_channels": 16, **config}
    transformer = model(kind.replace("Pipeline", "Transformer2DModel"), **config)
    return built(kind, transformer, text(returns), vae=autoencoder(config["in_channels"] // 4))


def flux2_autoencoder() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def flux2(kind: str = "Flux2KleinKVPipeline") -> Any:
    config = {"in_channels": 16, "axes_dims_rope": [4, 4, 4, 4], "guidance_embeds": kind == "Flux2Pipeline"}

    def encode(**given: Any) -> tuple:
        found = text("e")(**given)
        return found, torch.zeros(len(found), TOKENS, 4)

    transformer = model("Flux2Transformer2DModel", **{"out_channels": None, **config})
    return built(kind, transformer, encode, vae=flux2_autoencoder())


# -- Stable Diffusion 3, AuraFlow, CogView, HiDream ---------------------------------------------------------------

SD3 = {"patch_size": 1}


def sd3(kind: str = "StableDiffusion3Pipeline", scheduler: Any = None, **parts: Any) -> Any:
    channels = 16 if "Inpaint" in kind else 4  # which it looks at
    transformer = model("SD3Transformer2DModel", num_layers=2, **SD3, in_channels=channels, out_channels=channels)
    return built(kind, transformer, text("eEpP"), vae=autoencoder(channels), scheduler=scheduler, **parts)


def sd3_controlnet() -> Any:
    return model("SD3ControlNetModel", 3, **SD3)


def aura_flow() -> Any:
    transformer = model("AuraFlowTransformer2DModel", patch_size=1, pos_embed_max_size=64)
    return built("AuraFlowPipeline", transformer, text("emEM"), vae=autoencoder(force_upcast=False))


def cogview4(kind: str = "CogView4Pipeline", **changes: Any) -> Any:
    scheduler = Euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True)
    transformer = model("CogView4Transformer2DModel", **{"rope_axes_dim": (8, 8), **changes})
    return built(kind, transformer, text("eE"), vae=autoencoder(), scheduler=scheduler)


def cogview3() -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    transformer = model("CogView3PlusTransformer2DModel")
    return built("CogView3PlusPipeline", transformer, text("eE"), vae=autoencoder(), scheduler=scheduler)


def hidream() -> Any:
    several = {"caption_channels": [WIDTH, WIDTH], "llama_layers": [0, 1], "max_resolution": (8, 8)}
    transformer = model("HiDreamImageTransformer2DModel", patch_size=2, text_emb_dim=POOLED, **several)

    def encode(**given: Any) -> tuple:
        one, other, pooled, negative = text("eEpP")(**given)
        return one, other, torch.stack([one, one]), torch.stack([other, other]), pooled, negative

    pipe = built("HiDreamImagePipeline", transformer, encode, vae=autoencoder())
    pipe.default_sample_size = SIDE // 2
    return pipe


# -- PixArt, Sana, DiT, Hunyuan-DiT, Lumina, Latte ------------------------------------------------------------------

CLEAN = {"use_resolution_binning": False, "clean_caption": False}
PIXART = {**SIZE, **CLEAN}


def pixart(kind: str = "PixArtAlphaPipeline", scheduler: Any = None, side: int = 8) -> Any:
    transformer = model(
        "PixArtTransformer2DModel",
        scale=0.1,
        num_attention_heads=3,  # of 1024 pixels, sizes take a third of the width each
        attention_head_dim=8,
        out_channels=8,
        cross_attention_dim=24,
        sample_size=side,
        norm_num_groups=4,
    )
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler()
    return built(kind, transformer, text("emEM"), vae=autoencoder(), scheduler=scheduler)


SPRINT = {**SQUARE, **CLEAN, "complex_human_instruction": None}


def sana(kind: str = "SanaPipeline", **parts: Any) -> Any:
    sprint = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if "Sprint" in kind else {}
    transformer = model("SanaTransformer2DModel", patch_size=1, sample_size=32, **sprint)
    scheduler = diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler(**FLOW)
    parts = {"vae": Video(space=2, encoder_block_out_channels=(8, 8)), "scheduler": scheduler, **parts}
    return built(kind, transformer, text("em" if sprint else "emEM"), **parts)


def sana_sprint() -> Any:
    return sana("SanaSprintPipeline")


def sana_controlnet() -> Any:
    return model("SanaControlNetModel", 3, patch_size=1, sample_size=32)


def dit(scheduler: Any = None) -> Any:
    transformer = model("DiTTransformer2DModel", attention_head_dim=8, out_channels=8)
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    return built("DiTPipeline", transformer, vae=autoencoder(), scheduler=scheduler)


def hunyuan_dit() -> Any:
    lengths = {"text_len": TOKENS, "text_len_t5": TOKENS, "cross_attention_dim_t5": 16, "cross_attention_dim": 16}
    transformer = model("HunyuanDiT2DModel", scale=0.1, patch_size=2, num_layers=2, **lengths)
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    return built("HunyuanDiTPipeline", transformer, text("eEmM", 16), vae=autoencoder(), scheduler=scheduler)


def lumina2() -> Any:
    transformer = model("Lumina2Transformer2DModel", axes_lens=(32, 8, 8), multiple_of=16)
    return built("Lumina2Pipeline", transformer, text("emEM"))


def lumina() -> Any:
    transformer = model("LuminaNextDiT2DModel", cross_attention_dim=WIDTH, multiple_of=16)
    return built("LuminaPipeline", transformer, text("emEM"))


def latte() -> Any:
    transformer = model(
        "LatteTransformer3DModel",
        patch_size=2,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return built("LattePipeline", transformer, text("eE"), vae=autoencoder(), scheduler=scheduler)


# -- Z-Image, Qwen-Image, Krea, Kandinsky, Ideogram, ... ------------------------------------------------------------

Z_IMAGE = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def z_image(kind: str = "ZImagePipeline", **parts: Any) -> Any:
    axes = {"axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}
    transformer = model("ZImageTransformer2DModel", n_layers=1, **axes, **Z_IMAGE, **parts.pop("config", {}))
    for name, token in transformer.named_parameters():
        if name.endswith("pad_token"):
            token.data.fill_(0.5)  # made empty

    def encode(do_classifier_free_guidance: bool = True, **given: Any) -> tuple:
        found, negative = text("eE")(**given)
        return list(found), list(negative) if do_classifier_free_guidance else []

    return built(kind, transformer, encode, vae=autoencoder(), **parts)


def z_image_controlnet() -> Any:
    places = {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4}
    return model("ZImageControlNetModel", 3, **places, **Z_IMAGE)


QWEN = {"patch_size": 2, "in_channels": 16}


def qwen(kind: str = "QwenImagePipeline", **parts: Any) -> Any:
    parts = {"vae": Video(space=2, time=1), "text_encoder": Stub(), **parts}
    return built(kind, model("QwenImageTransformer2DModel", **QWEN), text("em"), **parts)


def qwen_edit(kind: str) -> Any:
    """One that edits pictures, which it brings to the size of 32x32 instead of 1024x1024."""
    pipe = qwen(kind, vae=Video(time=1), processor=None)
    module = sys.modules[type(pipe).__module__]
    sized = getattr(module.calculate_dimensions, "__wrapped__", module.calculate_dimensions)
    module.calculate_dimensions = functools.wraps(sized)(lambda _, ratio: sized(32 * 32, ratio))  # type: ignore
    return pipe


def qwen_controlnet(**changes: Any) -> Any:
    return model("QwenImageControlNetModel", 3, **QWEN, **changes)


class Processor:
    """What QwenImage21Pipeline reads of its processor when it is made."""

    tokenizer: Any = None

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, _: str) -> list[int]:
        return [99]


def qwen21() -> Any:
    transformer = model("QwenImage21Transformer2DModel", in_channels=8, out_channels=8, mlp_ratio=2)

    def encode(**given: Any) -> tuple:
        found, mask = text("em")(**given)
        return found, mask, torch.zeros(len(found), TOKENS, dtype=torch.bool)

    return built("QwenImage21Pipeline", transformer, encode, vae=Video(8, 16), processor=Processor())


def krea2() -> Any:
    of_text = {"text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2}
    of_text |= {"text_num_key_value_heads": 2, "text_intermediate_size": 16}
    blocks = {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "timestep_embed_dim": 8}
    transformer = model("Krea2Transformer2DModel", in_channels=16, **of_text, **blocks)

    def encode(prompt: Any, **_: Any) -> tuple:
        found = embedded(prompt, TOKENS, 2, 32)
        return found, torch.ones(len(found), TOKENS, dtype=torch.bool)

    return built("Krea2Pipeline", transformer, encode, vae=Video(space=2, time=1))


def kandinsky5(kind: str = "Kandinsky5T2VPipeline") -> Any:
    channels = {"in_visual_dim": 4, "out_visual_dim": 4, "visual_cond": kind != "Kandinsky5T2IPipeline"}
    transformer = model("Kandinsky5Transformer3DModel", **channels)

    def encode(prompt: Any, **_: Any) -> tuple:
        count = 1 if isinstance(prompt, str) else len(prompt)
        return *text("ep")(prompt), torch.arange(count + 1, dtype=torch.int32) * TOKENS

    pipe = built(kind, transformer, encode)
    pipe.resolutions = [(32, 32)]  # others are resized to one of these
    return pipe


def ideogram4() -> Any:
    one, other = (model("Ideogram4Transformer2DModel", s, in_channels=16, mrope_section=(4, 2, 2)) for s in (0, 5))

    def encode(prompt: Any, grid_h: int, grid_w: int, **_: Any) -> tuple:
        found = text("e")(prompt)
        count, length = len(found), TOKENS + grid_h * grid_w
        found = torch.cat([found, torch.zeros(count, length - TOKENS, WIDTH)], 1)
        places = torch.arange(length)[None, :, None].expand(count, -1, 3)
        indicator = torch.tensor([3] * TOKENS + [2] * (length - TOKENS)).expand(count, -1)
        return found, places, torch.ones(count, length, dtype=torch.long), indicator

    return built("Ideogram4Pipeline", one, encode, vae=flux2_autoencoder(), unconditional_transformer=other)


def ernie() -> Any:
    transformer = model("ErnieImageTransformer2DModel", in_channels=16, out_channels=16, patch_size=1)
    encode = lambda prompt, **_: list(text("e")(prompt))  # noqa: E731
    return built("ErnieImagePipeline", transformer, encode, vae=flux2_autoencoder())


def prx() -> Any:
    transformer = model("PRXTransformer2DModel", patch_size=2, mlp_ratio=2.0, depth=1, axes_dim=[8, 8])
    return built("PRXPipeline", transformer, text("emEM"), vae=autoencoder())


class Bytes:
    """What stands for a tokenizer: bytes are tokens."""

    model_max_length, eos_token_id = 512, 0

    def __call__(self, prompt: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[1 + byte for byte in prompt.encode()])

    def convert_tokens_to_ids(self, _: str) -> int:
        return 257


def omnigen() -> Any:
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

    if not hasattr(processor_omnigen, "transforms"):  # torchvision's, for images
        nothing = lambda *_, **__: None  # noqa: E731
        kinds = ("Compose", "Lambda", "ToTensor", "Normalize")
        processor_omnigen.transforms = SimpleNamespace(**dict.fromkeys(kinds, nothing))  # type: ignore
        pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
    scaling = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    sizes = {"pad_token_id": 0, "vocab_size": 300, "time_step_dim": 16, "rope_scaling": scaling}
    transformer = model("OmniGenTransformer2DModel", **sizes)
    return built("OmniGenPipeline", transformer, vae=Video(), tokenizer=Bytes())


def glm_image() -> Any:
    transformer = model("GlmImageTransformer2DModel", patch_size=2, prior_vq_quantizer_codebook_size=8)
    vae = Video(space=2)
    pipe = built("GlmImagePipeline", transformer, text("eE"), vae=vae, scheduler=Euler(use_dynamic_shifting=True))
    tokens = lambda prompt: torch.tensor([[len(str(p)) % 8] * 16 for p in prompt])  # noqa: E731
    pipe.generate_prior_tokens = lambda prompt, **_: (
        tokens([prompt] if isinstance(prompt, str) else prompt),
        None,
        None,
    )
    return pipe


class Vocoder(Stub):
    """What stands for a vocoder: the sound is the mean of its spectrum."""

    def forward(self, spectrum: Any, **_: Any) -> tuple:
        return (spectrum.mean(1, keepdim=True),)


def kandinsky6() -> Any:
    sides = {"in_visual_dim": 4, "out_visual_dim": 4, "visual_cond": True, "in_audio_dim": 4, "out_audio_dim": 4}
    audio = {"model_dim_a": 32, "time_dim_a": 8, "ff_dim_a": 32, "axes_dims_a": (16,)}
    transformer = model("Kandinsky6Transformer3DModel", **sides, **audio)
    parts = {"audio_vae": Video(sample_rate=600), "vocoder": Vocoder()}
    parts["audio_vae"].latent_hop_length = 8
    return built("Kandinsky6TI2VAPipeline", transformer, text("epbEPB"), **parts)


def cosmos3() -> Any:
    sizes = {"head_dim": 16, "num_hidden_layers": 1, "latent_channel": 4, "patch_latent_dim": 16, "vocab_size": 300}
    transformer = model("Cosmos3OmniTransformer", **sizes, dtype="float32", rope_axes_dim=(4, 2, 2))
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    parts = {"vae": Video(space=4), "text_tokenizer": Bytes(), "enable_safety_checker": False}
    pipe = built("Cosmos3OmniPipeline", transformer, scheduler=scheduler, **parts)
    words = lambda prompt: Bytes()(prompt or "-").input_ids  # noqa: E731
    tokens = lambda prompt, negative_prompt=None, **_: (words(prompt), words(negative_prompt))  # noqa: E731
    return encoding(pipe, tokens, "tokenize_prompt")


# -- LTX, Wan and its kin --------------------------------------------------------------------------------------------


def ltx(kind: str = "LTXConditionPipeline") -> Any:
    patches = {"patch_size": 1, "patch_size_t": 1, "attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = model("LTXVideoTransformer3DModel", **patches)
    vae = Video(space=8, time=2, timestep_conditioning=False)
    return built(kind, transformer, text("emEM"), vae=vae, scheduler=Euler())


def ltx2(kind: str = "LTX2Pipeline") -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    audio = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_cross_attention_dim": 8}
    audio |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "cross_attention_dim": 16}
    rope = {"rope_double_precision": False, "rope_type": "split", "caption_channels": 16}
    transformer = model("LTX2VideoTransformer3DModel", attention_head_dim=8, **audio, **rope)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    sides = {f"{side}_connector_{name}": size for side in ("video", "audio") for name, size in sizes.items()}
    torch.manual_seed(1)
    connectors = LTX2TextConnectors(text_proj_in_factor=1, connector_rope_base_seq_len=32, **sides, **rope)
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    kernels = {"upsample_kernel_sizes": [4], "upsample_factors": [2], "resnet_kernel_sizes": [3]}
    vocoder = LTX2Vocoder(in_channels=16, hidden_channels=8, resnet_dilations=[[1]], **kernels)
    parts = {"audio_vae": audio_vae.eval(), "connectors": connectors.eval(), "vocoder": vocoder.eval()}
    vae = Video(space=8, time=2, timestep_conditioning=False)
    return built(kind, transformer, text("emEM", 16), vae=vae, scheduler=Euler(), **parts)


LTX2 = {**VIDEO, "use_cross_timestep": False, "spatio_temporal_guidance_blocks": [0]}
WAN = {"height": 16, "width": 16, "num_frames": 5}


def wan(kind: str = "WanPipeline", experts: bool = False, scheduler: Any = None, **parts: Any) -> Any:
    """Wan's pipelines; with experts, the second transformer takes over below the boundary."""
    config, name = parts.pop("transformer", {}), parts.pop("transformer_class", "WanTransformer3DModel")
    if experts:
        parts = {"transformer_2": model(name, 7, **config), "boundary_ratio": 0.9, **parts}
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(**FLOW)
    parts = {"vae": Video(space=4), "scheduler": scheduler, **parts}
    return built(kind, model(name, **config), text("eE"), **parts)


class ImageEncoder(Stub):
    """What stands for CLIP and its processor: three hidden states of a picture."""

    def forward(self, images: Any = None, **_: Any) -> Any:
        found = torch.ones(len(images) if isinstance(images, list) else 1, 3, WIDTH)
        return type("Output", (dict,), {"hidden_states": [found, found], "to": lambda self, *_: self})(images=found)


def wan_animate() -> Any:
    motion = {"motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8}
    face = {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1}
    channels = {"in_channels": 12, "latent_channels": 4, "image_dim": WIDTH}
    sizes = {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}}
    encoder = {"image_encoder": ImageEncoder(), "image_processor": ImageEncoder()}
    kind = {"transformer_class": "WanAnimateTransformer3DModel", "transformer": {**motion, **face, **channels, **sizes}}
    return wan("WanAnimatePipeline", **kind, **encoder)


def helios(kind: str = "HeliosPipeline", scheduler: Any = None) -> Any:
    scheduler = scheduler or diffusers.HeliosScheduler(stages=1)
    return built(kind, model("HeliosTransformer3DModel"), text("eE"), vae=Video(space=2), scheduler=scheduler)


def skyreels(kind: str = "SkyReelsV2Pipeline") -> Any:
    transformer = model("SkyReelsV2Transformer3DModel", inject_sample_info="Forcing" in kind)
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    return built(kind, transformer, text("eE"), vae=Video(space=4), scheduler=scheduler)


class Guardrail(Stub):
    """What stands for the checker of Cosmos."""

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos(kind: str, scheduler: Any = None, **changes: Any) -> Any:
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):  # torchvision's, by which it makes a mask of zeros smaller
        resize = lambda mask, size, **_: nn.functional.interpolate(mask, size)  # noqa: E731
        modes = SimpleNamespace(NEAREST="nearest")
        functional = SimpleNamespace(resize=resize)
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)  # type: ignore
    sizes = {"mlp_ratio": 2, "max_size": (4, 32, 32), "extra_pos_embed_type": None}
    transformer = model("CosmosTransformer3DModel", **sizes, **changes)
    scheduler = scheduler or Euler(use_karras_sigmas=True)
    parts = {"vae": Video(space=4), "scheduler": scheduler, "safety_checker": Guardrail()}
    return built(kind, transformer, text("eE"), **parts)


# -- HunyuanVideo, CogVideoX, and other videos ------------------------------------------------------------------------


def hunyuan_video(kind: str = "HunyuanVideoPipeline", **changes: Any) -> Any:
    return built(kind, model("HunyuanVideoTransformer3DModel", **changes), text("epm"), scheduler=Euler(shift=7.0))


def framepack() -> Any:
    image = {"image_condition_type": None, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    transformer = model("HunyuanVideoFramepackTransformer3DModel", guidance_embeds=True, **image)
    pipe = built("HunyuanVideoFramepackPipeline", transformer, text("epm"), scheduler=Euler(shift=7.0))
    pipe.encode_image = lambda image, **_: torch.ones(len(image), 3, 16)
    return pipe


def _twice_encoded(prompt: Any, batch_size: int = 1, **_: Any) -> tuple:
    return text("emem")(prompt if isinstance(prompt, list) else [prompt or ""] * batch_size)


def hunyuan15(kind: str = "HunyuanVideo15Pipeline", task: str = "t2v") -> Any:
    transformer = model("HunyuanVideo15Transformer3DModel", in_channels=9, image_embed_dim=8, task_type=task)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe = built(kind, transformer, _twice_encoded, guider=guider)
    pipe.vision_num_semantic_tokens = 3
    return pipe


def hunyuan15_image() -> Any:
    pipe = hunyuan15("HunyuanVideo15ImageToVideoPipeline", "i2v")
    pipe.encode_image = lambda image, batch_size, *_, **__: torch.ones(batch_size, 3, 8)
    pipe.target_size = 32
    return pipe


def hunyuan_image() -> Any:
    transformer = model("HunyuanImageTransformer2DModel", rope_axes_dim=(8, 8))
    guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5)
    return built("HunyuanImagePipeline", transformer, _twice_encoded, vae=Video(space=2), guider=guider)


COGVIDEO = {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": TOKENS}
COGVIDEO_CALL = {**SIZE, "num_frames": 5, "max_sequence_length": TOKENS}


def cogvideox(kind: str = "CogVideoXPipeline", name: str = "CogVideoXTransformer3DModel", **changes: Any) -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    vae = Video(space=4, invert_scale_latents=False)
    return built(kind, model(name, **COGVIDEO, **changes), text("eE"), vae=vae, scheduler=scheduler)


def mochi() -> Any:
    sizes = {"num_layers": 2, "in_channels": 12, "out_channels": None, "max_sequence_length": TOKENS}
    transformer = model("MochiTransformer3DModel", text_embed_dim=16, **sizes)
    return built("MochiPipeline", transformer, text("ebEB", 16), vae=Video(12, time=6), scheduler=Euler())


def allegro() -> Any:
    sizes = {"attention_head_dim": 12, "cross_attention_dim": 24, "sample_height": 4, "sample_width": 4}
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    transformer = model("AllegroTransformer3DModel", **sizes, sample_frames=2)
    return built(
        "AllegroPipeline", transformer, text("emEM"), vae=Video(space=4, scaling_factor=5.0), scheduler=scheduler
    )


def easyanimate() -> Any:
    return built("EasyAnimatePipeline", model("EasyAnimateTransformer3DModel", patch_size=2), text("eEmM"))


def sana_video(kind: str = "SanaVideoPipeline") -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
    transformer = model("SanaVideoTransformer3DModel", sample_size=4)
    return built(kind, transformer, text("emEM"), vae=Video(space=4), scheduler=scheduler)
