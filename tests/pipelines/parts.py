"""What tiny pipelines are put together from: random weights, and stubs for text encoders and autoencoders. No test."""

import functools
import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

NOISE_SCALE = 0.1  # of random weights: large enough that the output depends on the step
SIDE = 16  # pixels
TOKENS, WIDTH, POOLED = 5, 12, 8


@dataclass
class Case:
    """A pipeline, what it is called with, and how it is calibrated.

    Attributes:
        arguments: of every call.
        per_prompt: a function from the number of prompts to the arguments of which each has its own.
        prompts: whether the call takes a prompt.
    """

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    per_prompt: Callable[[int], dict[str, list[Any]]] = lambda count: {}
    prompts: bool = True


def randomised(module: nn.Module, seed: int = 0, scale: float = NOISE_SCALE) -> nn.Module:
    """The module with random matrices, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=scale, generator=generator)
    return module.eval()


# sizes of transformers, by the names that diffusers has for them
SMALL = {
    **dict.fromkeys(("num_layers", "num_single_layers", "num_refiner_layers", "num_mmdit_layers", "mmdit_layers"), 1),
    **dict.fromkeys(("num_single_dit_layers", "num_text_blocks", "num_visual_blocks"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("attention_head_dim", "cross_attention_head_dim"), 16),
    **dict.fromkeys(("num_kv_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("in_channels", "out_channels"), 4),
    **dict.fromkeys(
        ("text_dim", "text_embed_dim", "text_embed_2_dim", "joint_attention_dim", "caption_channels"), WIDTH
    ),
    **dict.fromkeys(("cap_feat_dim", "context_in_dim", "text_in_dim", "llm_features_dim", "in_text_dim"), WIDTH),
    **dict.fromkeys(("pooled_projection_dim", "in_text_dim2"), POOLED),
    **dict.fromkeys(("hidden_size", "caption_projection_dim", "cross_attention_dim", "model_dim"), 32),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("freq_dim", "time_embed_dim", "time_dim", "condition_dim", "adaln_dim", "adaln_lora_dim"), 8),
    **dict.fromkeys(("sample_size", "pos_embed_max_size"), 8),
    **dict.fromkeys(("axes_dims_rope", "rope_axes_dim", "axes_dims", "axes_dim_rope", "rope_dim"), (8, 4, 4)),
}


def model(kind: str, seed: int = 0, scale: float = NOISE_SCALE, **config: Any) -> Any:
    """One of diffusers' models with random weights, of small sizes where none is given."""
    made = getattr(diffusers, kind)
    known = inspect.signature(made.__init__).parameters
    small = {name: size for name, size in SMALL.items() if name in known}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # biases are random too, and must not depend on what ran before
        return randomised(made(**{**small, **config}), seed, scale)


def embedded(prompt: Any, *shape: int) -> Tensor:
    """Random numbers that depend on each prompt: (prompts, *shape)."""
    prompts = [prompt] if isinstance(prompt, str) or prompt is None else list(prompt)
    generators = [torch.Generator().manual_seed(zlib.crc32(str(p).encode())) for p in prompts]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def text(returns: str, width: int = WIDTH, pooled: int = POOLED) -> Callable[..., Any]:
    """What stands for a text encoder: from prompts and negative prompts to what `returns` says, a letter each.

    e: an embedding of each token; p: a pooled one; m, b: a mask of numbers or truths; i: position ids. A capital is
    the negative prompts'.
    """
    kinds: dict[str, Callable[[list[Any]], Any]] = {
        "e": lambda prompts: embedded(prompts, TOKENS, width),
        "p": lambda prompts: embedded(prompts, pooled),
        "m": lambda prompts: torch.ones(len(prompts), TOKENS, dtype=torch.long),
        "b": lambda prompts: torch.ones(len(prompts), TOKENS, dtype=torch.bool),
        "i": lambda prompts: torch.zeros(TOKENS, 3),
    }

    def encode(prompt: Any = None, negative_prompt: Any = None, **_: Any) -> Any:
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompts)
        found = tuple(kinds[one.lower()](negative if one.isupper() else prompts) for one in returns)
        return found if len(found) > 1 else found[0]

    return encode


def encoding(pipe: Any, encode: Callable[..., Any], name: str = "encode_prompt") -> Any:
    """The pipeline with `encode` in place of its method that encodes prompts; it gets the arguments by name."""
    original = getattr(type(pipe), name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(None, *args, **kwargs).arguments
        return encode(**dict(list(given.items())[1:]))

    setattr(pipe, name, encode_prompt)
    return pipe


def built(kind: str, transformer: Any, encode: Callable[..., Any] | None = None, **parts: Any) -> Any:
    """One of diffusers' pipelines, without the parts that are not given.

    Args:
        kind: its class.
        encode: what stands for `encode_prompt`.
        parts: `vae` and `scheduler` among them, which have defaults.
    """
    made = getattr(diffusers, kind)
    given = {"vae": Video(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "transformer": transformer}
    given |= {name: part for name, part in parts.items() if part is not None or name not in given}
    wanted = inspect.signature(made.__init__).parameters
    missing = {name: None for name, one in wanted.items() if one.default is one.empty and name != "self"}
    pipe = made(**{**missing, **{name: part for name, part in given.items() if name in wanted}})
    pipe.set_progress_bar_config(disable=True)
    return pipe if encode is None else encoding(pipe, encode)


def autoencoder(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """An image VAE that halves its pictures."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
        **changes,
    ).eval()


class Distribution:
    """Latents as an autoencoder returns them."""

    def __init__(self, latents: Tensor):
        self.latents = self.mean = latents

    def sample(self, generator: Any = None) -> Tensor:
        return self.latents

    mode = sample


class Stub(nn.Module):
    """A module that stands for another one."""

    dtype, device = torch.float32, torch.device("cpu")


class Video(Stub):
    """What stands for an autoencoder, of videos or of pictures: it averages and repeats pixels, and mixes channels.

    Args:
        channels: of the latents.
        space, time: how many pixels across, and frames, one element of the latents stands for.
    """

    def __init__(self, channels: int = 4, space: int = 8, time: int = 4, **config: Any):
        super().__init__()
        mix = 0.3 * torch.randn(3, channels, generator=torch.Generator().manual_seed(1)) / channels**0.5
        self.mix = nn.Parameter(mix, requires_grad=False)
        self.space = self.spatial_compression_ratio = self.scale_factor_spatial = space
        self.time = self.temporal_compression_ratio = self.scale_factor_temporal = time
        halvings = space.bit_length() - 1
        self.temperal_downsample = [i >= halvings - (time.bit_length() - 1) for i in range(halvings)]
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        ratios = {"spatial_compression_ratio": space, "temporal_compression_ratio": time}
        ratios |= {"scale_factor_spatial": space, "scale_factor_temporal": time}
        means = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        widths = {"z_dim": channels, "latent_channels": channels, "block_out_channels": (8,) * (halvings + 1)}
        known = {"scaling_factor": 1.0, "shift_factor": 0.0, **ratios, **means, **widths, **config}
        self.config = diffusers.configuration_utils.FrozenDict(known)

    def encode(self, pixels: Tensor, return_dict: bool = True) -> Any:
        if pixels.ndim == 5:
            pixels = pixels[:, :, :: self.time]
        ratios = (1,) * (pixels.ndim - 4) + (self.space, self.space)
        pooled = (nn.functional.avg_pool3d if pixels.ndim == 5 else nn.functional.avg_pool2d)(pixels, ratios)
        found = Distribution(torch.einsum("oc,bo...->bc...", self.mix, pooled))
        return SimpleNamespace(latent_dist=found, latent=found.latents) if return_dict else (found,)

    def decode(self, latents: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        pixels = torch.einsum("oc,bc...->bo...", self.mix, latents)
        for dim in (-1, -2):
            pixels = pixels.repeat_interleave(self.space, dim)
        if pixels.ndim == 5:
            pixels = pixels.repeat_interleave(self.time, 2)[:, :, self.time - 1 :]
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        pass


def picture(seed: int, side: int = SIDE) -> Tensor:
    """An image (1, 3, side, side) in [0, 1]."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def photo(side: int, seed: int = 5) -> Any:
    """A picture as PIL has it."""
    return diffusers.utils.pt_to_pil(picture(seed, side))[0]


def clip(side: int, frames: int, seed: int = 0) -> list[Any]:
    """A video as a list of pictures."""
    return [photo(side, 100 * seed + frame) for frame in range(frames)]
