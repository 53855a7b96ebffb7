"""Open-Sora 1.2 as a diffusers pipeline: text to video and to picture, longer videos in loops, conditioning.

Source of the order of operations: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from .conditioning import apply_mask_strategy, continue_strategy, dframe_to_frame, load_reference
from .denoising import Denoising, Generators, Sampling
from .geometry import VIDEO_FPS
from .inputs import Loops, Request, VideoShape, check_callback, check_embeds, read_requests, video_shape
from .scheduler import FrameMask, RFlowScheduler
from .stdit3 import STDiT3
from .text import prompts_of_loop
from .vae import OpenSoraVAE

__all__ = ["OpenSoraPipeline", "OpenSoraPipelineOutput"]

Callback = Callable[..., dict[str, Tensor]] | PipelineCallback | MultiPipelineCallbacks
OUTPUT_TYPES = ("latent", "pt", "np", "pil")


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """The videos of a call; a picture is a video of one frame.

    Attributes:
        frames: "pt" (B, F, 3, height, width) and "np" (B, F, height, width, 3) in [0, 1], "pil" a list of frames
            for every video, "latent" (B, C, T, H, W).
    """

    frames: Any


class OpenSoraPipeline(Denoising, DiffusionPipeline):
    """Videos and pictures from text.

    Args:
        transformer, vae, scheduler: see their classes.
        text_encoder, tokenizer: T5; may be None for calls with prompt_embeds.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")
    _optional_components = ("text_encoder", "tokenizer")

    def __init__(
        self,
        transformer: STDiT3,
        vae: OpenSoraVAE,
        scheduler: RFlowScheduler,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.video_processor = VideoProcessor(vae_scale_factor=vae.spatial_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._interrupt = False

    @classmethod
    def from_official(
        cls,
        transformer: str = "hpcai-tech/OpenSora-STDiT-v3",
        vae: str = "hpcai-tech/OpenSora-VAE-v1.2",
        text_encoder: str = "DeepFloyd/t5-v1_1-xxl",
        dtype: torch.dtype = torch.bfloat16,
        text_encoder_dtype: torch.dtype = torch.float32,
        transformer_class: type[STDiT3] = STDiT3,
    ) -> Self:
        """The pipeline of the official repositories, by hub id or folder. The original runs T5 in float32."""
        return cls(
            transformer=transformer_class.from_pretrained(transformer, dtype=dtype),
            vae=OpenSoraVAE.from_pretrained(vae, dtype=dtype),
            scheduler=RFlowScheduler(),
            text_encoder=T5EncoderModel.from_pretrained(text_encoder, dtype=text_encoder_dtype),
            tokenizer=AutoTokenizer.from_pretrained(text_encoder),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | str = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        fps: float = VIDEO_FPS,
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        clean_caption: bool = True,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        references: Sequence[Any] | None = None,
        mask_strategy: str | Sequence[str] | None = None,
        num_loops: int = 1,
        condition_frame_length: int = 5,
        condition_frame_edit: float = 0.0,
        align: int | None = 5,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Generate.

        Args:
            prompt: one or several. "|0|text|2|text" gives loops their own text; a JSON object at the end may hold
                reference_path and mask_strategy.
            height, width: pixels; or resolution and aspect_ratio (height to width), "480p" and "9:16" by default.
            num_frames: 1 for a picture, else 17 or more, or a name such as "2s".
            num_inference_steps: Euler steps.
            guidance_scale: v = v_null + scale (v_cond - v_null), both in one call; 1 leaves the null caption out.
            fps: frame rate that the network is told for videos.
            aesthetic_score, motion_score, camera_motion: appended to the prompt where given.
            clean_caption: clean the prompt as training captions were; otherwise it is stripped and lower-cased.
            num_videos_per_prompt: videos of each prompt, one after another in the result.
            generator: of initial noise and of noise that references are mixed with; one, or one a video.
            latents: initial noise (B, C, T, H, W) of the first loop.
            prompt_embeds, prompt_attention_mask: caption states (B, L, channels) and 1 for real tokens (B, L), in
                place of a prompt.
            references: a prompt's list of pictures, videos, paths or pixels; of several prompts, one list each.
            mask_strategy: which reference frames go where, a text a prompt; see `conditioning`.
            num_loops: pieces of a longer video, each of which begins with the end of the last.
            condition_frame_length: latent frames that a piece takes from the last one; a multiple of 5.
            condition_frame_edit: how far those may change, 0 to 1.
            align: latent frames that positions of a mask strategy are moved to multiples of.
            output_type: "latent", "pt", "np" or "pil".
            callback_on_step_end: called as f(pipe, step, timestep, tensors); may return tensors to go on with.
            callback_on_step_end_tensor_inputs: which of "latents" and "prompt_embeds" it is given.

        Returns:
            `OpenSoraPipelineOutput`, or a tuple of its frames without return_dict.

        Raises:
            ValueError: arguments that do not fit together or that the model cannot serve.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is unknown; there are {', '.join(OUTPUT_TYPES)}")
        factor = self.vae.spatial_factor
        shape = video_shape(height, width, resolution, aspect_ratio, num_frames, fps, factor)
        loops = Loops(num_loops, condition_frame_length, condition_frame_edit, align)
        loops.check(shape, self.vae.latent_size(shape.frames, shape.height, shape.width)[0])
        sampling = Sampling(
            num_inference_steps, generator, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs)
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        options = {"aes": aesthetic_score, "flow": motion_score, "camera_motion": camera_motion, "clean": clean_caption}
        captions = self._given_captions(prompt, prompt_embeds, prompt_attention_mask, num_videos_per_prompt)
        requests = self._requests(prompt, prompt_embeds, references, mask_strategy, num_videos_per_prompt, options)
        frames = self._generate(requests, captions, shape, loops, sampling, latents, output_type == "latent")
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(frames.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=frames) if return_dict else (frames,)

    def _given_captions(
        self, prompt: Any, embeds: Tensor | None, mask: Tensor | None, copies: int
    ) -> tuple[Tensor, Tensor] | None:
        """Captions where the call brings their states along."""
        if (prompt is None) == (embeds is None):
            raise ValueError("give prompt or prompt_embeds, and not both")
        if embeds is None:
            return None
        states, mask = check_embeds(embeds, mask, *self.caption_shape)
        return states.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)

    @staticmethod
    def _requests(
        prompt: str | Sequence[str] | None,
        embeds: Tensor | None,
        references: Sequence[Any] | None,
        strategies: str | Sequence[str] | None,
        copies: int,
        options: dict[str, Any],
    ) -> list[Request]:
        if isinstance(prompt, str):
            prompt, references = [prompt], None if references is None else [references]
        prompts = [""] * len(embeds) if prompt is None else prompt
        if not prompts:
            raise ValueError("there is no prompt")
        strategies = [strategies] if isinstance(strategies, str) else strategies
        return read_requests(prompts, references, strategies, copies, **options)

    def _generate(
        self,
        requests: list[Request],
        given_captions: tuple[Tensor, Tensor] | None,
        shape: VideoShape,
        loops: Loops,
        sampling: Sampling,
        latents: Tensor | None,
        as_latents: bool,
    ) -> Tensor:
        """Latents or pixels in [-1, 1], (B, channels, frames, rows, columns), of all loops together."""
        self._encode_references(requests, shape, sampling.generator)
        pieces: list[Tensor] = []
        video: Tensor | None = None
        for loop in range(loops.count):
            prompts = prompts_of_loop([request.prompt for request in requests], loop)
            captions = given_captions or self.encode_prompt(prompts)
            if loop > 0:
                self._hand_over(requests, loop, loops, video, sampling.generator)
            noise = self.prepare_latents(len(requests), shape, sampling.generator, None if loop else latents)
            start, frame_mask = self._condition(noise, requests, loop, loops.align)
            piece = self.denoise(start, captions, shape, frame_mask, sampling)
            video = None if as_latents and loop + 1 == loops.count else self._decode(piece, shape)
            repeated = 0 if loop == 0 else loops.length  # what the piece has from the last one
            pieces.append(piece[:, :, repeated:] if as_latents else video[:, :, dframe_to_frame(repeated) :])
        return torch.cat(pieces, dim=2)

    def _decode(self, latents: Tensor, shape: VideoShape) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype), num_frames=shape.frames)

    def _encode_references(self, requests: list[Request], shape: VideoShape, generator: Generators) -> None:
        """Put latents in place of the requests' references."""
        for i, request in enumerate(requests):
            own = generator[i] if isinstance(generator, list) else generator
            encoded = []
            for reference in request.references:
                pixels = load_reference(reference, shape.height, shape.width)
                pixels = pixels[None].to(self._execution_device, self.vae.dtype)
                encoded.append(self.vae.encode(pixels, own)[0])
            request.references = encoded

    def _hand_over(
        self, requests: list[Request], loop: int, loops: Loops, video: Tensor, generator: Generators
    ) -> None:
        """Make the last piece a reference of every request, with the rule that this loop begins with its end."""
        for i, request in enumerate(requests):
            own = generator[i] if isinstance(generator, list) else generator
            request.references = [*request.references, self.vae.encode(video[i : i + 1], own)[0]]
            index = len(request.references) - 1
            request.strategy = continue_strategy(request.strategy, loop, index, loops.length, loops.edit)

    @staticmethod
    def _condition(
        noise: Tensor, requests: list[Request], loop: int, align: int | None
    ) -> tuple[Tensor, FrameMask | None]:
        """Noise with the references in place, and which frames are made; None for all."""
        references = [request.references for request in requests]
        start, mask = apply_mask_strategy(noise, references, [request.strategy for request in requests], loop, align)
        # with every frame to be made a mask changes nothing and would only cost time
        return start, None if bool((mask == 1).all()) else FrameMask(mask)
