"""The arithmetic of training: bfloat16 where the hardware multiplies it, float32 elsewhere."""

import torch


def autocast(device: str) -> torch.autocast:
    """A context of bfloat16 matrix products on a GPU, or on a CPU with instructions for them.

    Elsewhere it changes nothing: a CPU without them takes over ten times as long in bfloat16 as in float32.
    """
    enabled = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device, torch.bfloat16, enabled=enabled)
