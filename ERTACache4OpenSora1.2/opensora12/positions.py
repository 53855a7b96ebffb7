"""Position and scalar codes of STDiT3: fixed functions, no parameters.

Source of the formulas: Open-Sora 1.2 (hpcaitech/Open-Sora, tag v1.2.0), the network's code as released.
"""

import math

import torch
from torch import Tensor

PERIOD = 10000.0


def scalar_features(values: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal features of scalars, [n] -> [n, width] float32: all cosines, then all sines.

    Frequencies are exp(-ln(10000) k / half) for k = 0 .. half - 1, half = width / 2.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(PERIOD) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_frequencies(channels: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """10000^(-2k / (C/2)) for k = 0 .. C/4 - 1, [C/4], rounded to the network's dtype.

    The original keeps them in a buffer that follows the network's dtype, so bfloat16 networks were trained to
    be used with rounded frequencies. They are made anew here, so that no loader can leave them unrounded.
    """
    steps = torch.arange(0, channels // 2, 2, dtype=torch.float32, device=device)
    return (1.0 / PERIOD ** (steps / (channels // 2))).to(dtype)


def grid_code(rows: int, columns: int, scale: Tensor, frequencies: Tensor) -> Tensor:
    """Spatial position code of one frame, [1, rows * columns, C] float32.

    Coordinates are (index / scale) (base / count), base = round(sqrt(rows columns)), so that one picture size
    in pixels spans the same range whatever the aspect ratio. A token's code is its column's, then its row's,
    each all sines before all cosines.

    Args:
        scale: sqrt(height width) / input_sq_size of the requested picture, in pixels; 0-dimensional.
        frequencies: [C/4], see `grid_frequencies`.
    """
    base = round(math.sqrt(rows * columns))

    def axis_code(count: int) -> Tensor:
        index = torch.arange(count, dtype=torch.float32, device=frequencies.device)
        angles = (index / scale * (base / count))[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    row_code = axis_code(rows)[:, None].expand(rows, columns, -1)
    column_code = axis_code(columns)[None].expand(rows, columns, -1)
    return torch.cat([column_code, row_code], dim=-1).flatten(0, 1)[None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs; x [..., frames, d], cos and sin [frames, d/2].

    All in the dtype that comes in: the released model was used with bfloat16 angles, and better ones would
    differ from it.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
