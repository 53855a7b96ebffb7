"""The denoising run of Open-Sora 1.2's pipeline: captions, initial noise, and the loop over the steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .inputs import VideoShape
from .scheduler import FrameMask

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How a call samples.

    Attributes:
        generator: of all noise; one, or one a video.
        callback: called as f(pipe, step, timestep, tensors) after every step; tensors that it returns replace
            those of the run.
        callback_inputs: names of the tensors that it is given.
    """

    num_steps: int
    generator: Generators
    callback: Callable[..., dict[str, Tensor]] | None
    callback_inputs: Sequence[str]


class Denoising:
    """Mixin of the pipeline: what happens to one batch of latents."""

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` leaves the steps that are left untaken."""
        return self._interrupt

    @property
    def caption_shape(self) -> tuple[int, int]:
        """Tokens and channels of a caption's states."""
        return self.transformer.config.model_max_length, self.transformer.config.caption_channels

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Caption states [n, 1, L, channels] on the device, and 1 for real tokens [n, L] on the host.

        Raises:
            ValueError: the pipeline has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("the pipeline has no text encoder and tokenizer: call it with prompt_embeds")
        tokens = self.tokenizer(
            list(prompts),
            max_length=self.caption_shape[0],
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        device = self._execution_device
        states = self.text_encoder(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))[0]
        return states[:, None], tokens.attention_mask

    def prepare_latents(
        self, count: int, shape: VideoShape, generator: Generators, latents: Tensor | None = None
    ) -> Tensor:
        """Initial noise [count, C, T, H, W] in the network's dtype.

        Raises:
            ValueError: `latents` have another shape, or there are not as many generators as videos.
        """
        size = self.vae.latent_size(shape.frames, shape.height, shape.width)
        wanted = (count, self.transformer.config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"there are {len(generator)} generators for {count} videos")
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            return randn_tensor(wanted, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != wanted:
            raise ValueError(f"latents are {list(latents.shape)}, they must be {list(wanted)} for this size and length")
        return latents.to(device, dtype)

    def denoise(
        self,
        latents: Tensor,
        captions: tuple[Tensor, Tensor],
        shape: VideoShape,
        frame_mask: FrameMask | None,
        sampling: Sampling,
    ) -> Tensor:
        """All steps from noise to latents of a video, (B, C, T, H, W) float32.

        Args:
            captions: states and mask, as `encode_prompt` gives them.
            frame_mask: which frames are made; None for all.
        """
        scheduler, dtype, device = self.scheduler, self.transformer.dtype, latents.device
        sizes = {"height": shape.height, "width": shape.width, "num_frames": shape.frames}
        scheduler.set_timesteps(sampling.num_steps, **sizes, dtype=dtype, device=device)
        scheduler.set_begin_index(0)
        timesteps = scheduler.timesteps
        self._num_timesteps = len(timesteps)
        conditions = self._conditions(captions, shape, len(latents), device)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                # drawn at every step, used or not: so does the original, and what follows it draws on from there
                noise = randn_tensor(latents.shape, sampling.generator, device, latents.dtype)
                generated = None
                if frame_mask is not None:
                    latents, generated = frame_mask.before_step(latents, t, noise)
                velocity = self._velocity(latents, t, generated, conditions)
                following = scheduler.step(velocity, t, latents, return_dict=False)[0]
                latents = following if frame_mask is None else frame_mask.after_step(latents, following, generated)
                latents = self._call_back(sampling, i, t, latents, captions, conditions)
                bar.update()
        self._current_timestep = None
        return latents

    def _conditions(
        self, captions: tuple[Tensor, Tensor], shape: VideoShape, count: int, device: torch.device
    ) -> dict[str, Tensor]:
        """What the transformer gets at every step, for both halves of the batch."""
        branches = 2 if self.do_classifier_free_guidance else 1
        states, mask = captions
        arguments = shape.for_network(branches * count, self.transformer.dtype, device)
        # the null caption is cut to the prompt's tokens, so its mask is the prompt's
        return {**arguments, "y": self._with_null_caption(states), "mask": mask.repeat(branches, 1)}

    def _with_null_caption(self, states: Tensor) -> Tensor:
        """[B, 1, L, channels] -> [2 B, ...], captions and then null captions; unchanged without guidance."""
        states = states.to(self._execution_device, self.transformer.dtype)
        if not self.do_classifier_free_guidance:
            return states
        null = self.transformer.y_embedder.y_embedding.to(states)
        return torch.cat([states, null.expand_as(states)])

    def _velocity(self, latents: Tensor, t: Tensor, generated: Tensor | None, conditions: dict[str, Tensor]) -> Tensor:
        """Guided velocity data - noise, float32: v_null + scale (v_cond - v_null)."""
        branches = 2 if self.do_classifier_free_guidance else 1
        with self.transformer.cache_context("cond_uncond" if branches == 2 else "cond"):
            output = self.transformer(
                latents.repeat(branches, 1, 1, 1, 1),
                t.expand(branches * len(latents)),
                x_mask=None if generated is None else generated.repeat(branches, 1),
                return_dict=False,
                **conditions,
            )[0]
        velocity = output[:, : latents.shape[1]]  # the rest are variances, which the sampler does not use
        if branches == 1:
            return velocity
        cond, null = velocity.chunk(2)
        return null + self.guidance_scale * (cond - null)

    def _call_back(
        self,
        sampling: Sampling,
        step: int,
        t: Tensor,
        latents: Tensor,
        captions: tuple[Tensor, Tensor],
        conditions: dict[str, Any],
    ) -> Tensor:
        """Latents to go on with; new caption states go into `conditions`."""
        if sampling.callback is None:
            return latents
        tensors = {"latents": latents, "prompt_embeds": captions[0]}
        result = sampling.callback(self, step, t, {name: tensors[name] for name in sampling.callback_inputs}) or {}
        if "prompt_embeds" in result:
            conditions["y"] = self._with_null_caption(result["prompt_embeds"])
        return result.get("latents", latents)
