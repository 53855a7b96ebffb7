"""The conditioning mask of Open-Sora 1.2's sampler: frames that a run keeps, makes, or lets change late.

Source: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0).
"""

import torch
from torch import Tensor


class FrameMask:
    """Which latent frames a run generates, and when: the conditioning mask.

    Args:
        mask: [B, T], 1 generates a frame, 0 keeps it as it is, a value between lets it change from the time
            1000 x value on.
        num_timesteps: time of pure noise.
    """

    def __init__(self, mask: Tensor, num_timesteps: int = 1000):
        self.mask = mask.float()
        self.num_timesteps = num_timesteps
        self.noised = self.mask == 1

    def before_step(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noise the frames that begin to change at this time.

        Args:
            sample, noise: [B, C, T, H, W].

        Returns:
            The latents that the model is given, and bool [B, T]: frames that this step generates.
        """
        generated = self.mask * self.num_timesteps >= timestep
        beginning = generated & ~self.noised
        self.noised = generated
        time = (timestep / self.num_timesteps).to(sample.device)
        noisy = (1 - time) * sample + time * noise
        return torch.where(_over_latents(beginning), noisy, sample), generated

    @staticmethod
    def after_step(before: Tensor, after: Tensor, generated: Tensor) -> Tensor:
        """The latents after a step, with the frames that it did not generate as they were before it."""
        return torch.where(_over_latents(generated), after, before)


def _over_latents(frames: Tensor) -> Tensor:
    return frames[:, None, :, None, None]
