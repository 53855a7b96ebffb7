"""The rectified-flow sampler of Open-Sora 1.2, and the mask that keeps frames of a conditioning video.

Source: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0). Time t falls from 1000 (noise) to 0 (data):
x_t = (1 - t/1000) data + (t/1000) noise. The network predicts v = data - noise, so steps are positive:
x' = x + v dt with dt = (t_i - t_{i+1}) / 1000. diffusers' flow matching has the opposite sign in both.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from .frame_mask import FrameMask
from .geometry import CHUNK_FRAMES, CHUNK_LATENTS

__all__ = ["FrameMask", "RFlowScheduler", "RFlowSchedulerOutput", "transform_ratio", "transform_times"]

BASE_PIXELS = 512 * 512  # picture at which the transform leaves times as they are


@dataclass
class RFlowSchedulerOutput(BaseOutput):
    """prev_sample: latents after the step, [B, C, T, H, W]."""

    prev_sample: Tensor


def transform_ratio(height: Tensor, width: Tensor, num_frames: Tensor) -> Tensor:
    """r = sqrt(height width / 512^2) sqrt(latent frames), [1], in the dtype that comes in.

    bfloat16 sizes give a bfloat16 ratio, as in the original; the timesteps differ in the fourth digit.

    Raises:
        ValueError: 2 to 16 frames, which count as no latent frame and would make every time 0 / 0; a size whose
            pixels overflow float16.
    """
    latent_frames = num_frames // CHUNK_FRAMES * CHUNK_LATENTS
    if float(num_frames) == 1:
        latent_frames = torch.ones_like(num_frames)
    elif float(latent_frames) < 1:
        raise ValueError(f"num_frames is {int(num_frames)}: Open-Sora 1.2 makes 1 frame or {CHUNK_FRAMES} and more")
    pixels = height * width
    if not bool(pixels.isfinite().all()):
        raise ValueError(
            f"{int(height)}x{int(width)} pixels overflow {str(pixels.dtype).removeprefix('torch.')} in the noise grid, "
            "in the original too: use bfloat16 or float32"
        )
    return (pixels / BASE_PIXELS).sqrt() * latent_frames.sqrt()


def transform_times(times: Tensor, ratio: Tensor) -> Tensor:
    """u' = r u / (1 + (r - 1) u) of times u in [0, 1]: larger videos spend more steps near noise."""
    return ratio * times / (1 + (ratio - 1) * times)


class RFlowScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps along rectified flow.

    Args:
        num_timesteps: time of pure noise.
        use_timestep_transform: move the times with the size of the video.
        use_discrete_timesteps: round the times to integers, before the transform.
        transform_scale: a further factor of the transform's ratio.

    After `set_timesteps`: `timesteps` [N], and `sigmas` [N + 1] on the host, the noise levels from 1 to 0.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_timesteps: int = 1000,
        use_timestep_transform: bool = True,
        use_discrete_timesteps: bool = False,
        transform_scale: float = 1.0,
    ):
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """The next step of the run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that a run starts with; without it the first call of `step` looks its time up."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int,
        height: int | Tensor | None = None,
        width: int | Tensor | None = None,
        num_frames: int | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        """Times of a run: 1000 (1 - i/N), i = 0 .. N - 1, then the transform.

        Args:
            num_inference_steps: N.
            height, width: requested size in pixels.
            num_frames: frames of the video; 1 for a picture.
            dtype: the network's; the transform rounds sizes to it, as the original does.

        Raises:
            ValueError: no step, a size is missing that the transform needs, or 2 to 16 frames.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, it must be at least 1")
        total = self.config.num_timesteps
        times = [(1.0 - i / num_inference_steps) * total for i in range(num_inference_steps)]
        timesteps = torch.tensor(times, dtype=torch.float32)
        if self.config.use_discrete_timesteps:
            timesteps = timesteps.round().long()
        if self.config.use_timestep_transform:
            sizes = {"height": height, "width": width, "num_frames": num_frames}
            missing = [name for name, value in sizes.items() if value is None]
            if missing:
                raise ValueError(f"set_timesteps needs {', '.join(missing)}: the timestep transform depends on it")
            ratio = transform_ratio(*(_size(value, dtype) for value in sizes.values()))
            timesteps = transform_times(timesteps / total, ratio * self.config.transform_scale) * total
        self.num_inference_steps = num_inference_steps
        self.timesteps = timesteps.to(device)
        self.sigmas = torch.cat([timesteps.float() / total, torch.zeros(1)])
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample: this sampler does not scale."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - t/1000) data + (t/1000) noise; timesteps [B] or one."""
        times = torch.as_tensor(timesteps, dtype=torch.float32, device=noise.device) / self.config.num_timesteps
        times = times.reshape(-1, *[1] * (noise.ndim - 1))
        return (1 - times) * original_samples + times * noise

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> RFlowSchedulerOutput | tuple[Tensor]:
        """x + v dt, in float32.

        Args:
            model_output: guided velocity v = data - noise, shape of the sample.
            timestep: the present one of `timesteps`; read only where no step index is known.
            sample: x.

        Raises:
            ValueError: `set_timesteps` was not called, or the run is over.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._step_index is None:
            self._step_index = self._lookup(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"the run's {len(self.timesteps)} steps are taken: call set_timesteps again")
        dt = self._increment(self._step_index).to(sample.device)
        self._step_index += 1
        previous = sample.float() + model_output.float() * dt
        return RFlowSchedulerOutput(previous) if return_dict else (previous,)

    def _increment(self, index: int) -> Tensor:
        """(t_i - t_{i+1}) / 1000 with t_N = 0, 0-dimensional."""
        time = self.timesteps[index]
        following = self.timesteps[index + 1] if index + 1 < len(self.timesteps) else torch.zeros_like(time)
        return (time - following) / self.config.num_timesteps

    def _lookup(self, timestep: Tensor | float) -> int:
        distance = (self.timesteps - torch.as_tensor(timestep, device=self.timesteps.device)).abs()
        return int(distance.argmin())

    def __len__(self) -> int:
        return self.config.num_timesteps


def _size(value: int | float | Tensor, dtype: torch.dtype) -> Tensor:
    """A size as [1] on the host, in the network's dtype."""
    return torch.as_tensor(value).detach().cpu().reshape(-1)[:1].to(dtype)
