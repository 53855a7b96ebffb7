"""What a call of the pipeline asks for, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import geometry
from .text import extract_json, prepare_prompt

DEFAULT_RESOLUTION, DEFAULT_RATIO = "480p", "9:16"


@dataclass(frozen=True)
class VideoShape:
    """A requested video: size in pixels, frames, and frames per second that the network is told."""

    height: int
    width: int
    frames: int
    fps: float

    def for_network(self, count: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """height, width and fps, [count] each. In the network's dtype: the original rounds them so."""
        values = {"height": self.height, "width": self.width, "fps": self.fps}
        return {name: torch.full((count,), value, dtype=dtype, device=device) for name, value in values.items()}


def video_shape(
    height: int | None,
    width: int | None,
    resolution: str | None,
    aspect_ratio: str | None,
    num_frames: int | str,
    fps: float,
    factor: int,
) -> VideoShape:
    """The shape that a call asks for, by size or by name.

    Raises:
        ValueError: half a size, both a size and a name, or what `geometry` refuses.
    """
    if (height is None) != (width is None):
        raise ValueError("give height and width, or neither")
    if height is not None and (resolution is not None or aspect_ratio is not None):
        raise ValueError("give height and width, or resolution and aspect_ratio, not both")
    if height is None:
        height, width = geometry.image_size(resolution or DEFAULT_RESOLUTION, aspect_ratio or DEFAULT_RATIO)
    geometry.check_size(height, width, factor)
    frames = geometry.num_frames(num_frames)
    return VideoShape(height, width, frames, geometry.network_fps(frames, fps))


@dataclass
class Request:
    """One video to make: its prompt, and the references that frames are taken from.

    Attributes:
        prompt: cleaned, with scores; may have parts for several loops.
        references: pictures, videos or paths; latents [C, T, H, W] once they are encoded.
        strategy: mask strategy, see `conditioning`.
    """

    prompt: str
    references: list[Any]
    strategy: str


def read_requests(
    prompts: Sequence[str],
    references: Sequence[Sequence[Any]] | None,
    strategies: Sequence[str] | None,
    copies: int,
    **prompt_options: Any,
) -> list[Request]:
    """Requests of prompts, `copies` of each; prompts may end in a JSON object with references and strategy.

    Args:
        prompt_options: of `text.prepare_prompt`.

    Raises:
        ValueError: not one list of references and one strategy a prompt, or a malformed prompt.
    """
    for name, values in (("references", references), ("mask_strategy", strategies)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} entries for {len(prompts)} prompts")
    texts, paths, found = extract_json(prompts, None, strategies)
    requests = []
    for i, text in enumerate(texts):
        given = list(references[i]) if references is not None else []
        named = paths[i].split(";") if paths[i] else []
        prompt = prepare_prompt(text, **prompt_options)
        requests += [Request(prompt, given + named, found[i] or "") for _ in range(copies)]
    return requests


def check_embeds(embeds: Tensor, mask: Tensor | None, length: int, channels: int) -> tuple[Tensor, Tensor]:
    """Caption states as [n, 1, L, channels] and their mask [n, L] on the host.

    Raises:
        ValueError: other shapes.
    """
    states = embeds[:, None] if embeds.ndim == 3 else embeds
    if states.ndim != 4 or tuple(states.shape[1:]) != (1, length, channels):
        raise ValueError(f"prompt_embeds are {list(embeds.shape)}, they must be [n, {length}, {channels}]")
    if mask is None:
        mask = torch.ones(states.shape[0], length, dtype=torch.long)
    if tuple(mask.shape) != (states.shape[0], length):
        raise ValueError(f"prompt_attention_mask is {list(mask.shape)}, it must be [{states.shape[0]}, {length}]")
    return states, mask.cpu()


def check_callback(names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs knows {', '.join(known)}, not {', '.join(unknown)}")


@dataclass(frozen=True)
class Loops:
    """Pieces of a longer video, each of which begins with the end of the last.

    Attributes:
        count: pieces.
        length: latent frames that a piece takes from the last one.
        edit: how far those may change, 0 to 1.
        align: latent frames that positions of a mask strategy are moved to multiples of.
    """

    count: int
    length: int
    edit: float
    align: int | None

    def check(self, shape: VideoShape, latent_frames: int) -> None:
        """Raise ValueError where the pieces do not fit."""
        if self.count < 1:
            raise ValueError(f"num_loops is {self.count}, it must be at least 1")
        if self.count == 1:
            return
        if self.length < 1 or self.length % geometry.CHUNK_LATENTS:
            raise ValueError(
                f"condition_frame_length is {self.length}, it must be a multiple of {geometry.CHUNK_LATENTS}"
            )
        if self.length >= latent_frames:
            raise ValueError(
                f"{shape.frames} frames have {latent_frames} latent frames, too few for pieces that begin with "
                f"{self.length} of the last one"
            )
        if self.length % (self.align or 1):
            raise ValueError(f"condition_frame_length {self.length} is not a multiple of align {self.align}")
