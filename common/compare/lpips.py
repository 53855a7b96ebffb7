"""LPIPS v0.1 with the AlexNet trunk (Zhang et al., 2018, arXiv 1801.03924), without torchvision.

d(a, b) = sum over layers of mean over pixels of w_l . (f_l(a) - f_l(b))^2, f_l the features after the l-th ReLU, of
unit length across channels. The linear weights w_l ship here. The trunk (10 MB) comes from the file named by
ERTACACHE_LPIPS_TRUNK or from torchvision; without both, `load_lpips` says so.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ertacache.errors import ERTACacheError

TRUNK_VARIABLE = "ERTACACHE_LPIPS_TRUNK"
LINEAR_FILE = Path(__file__).parent / "data" / "lpips_linear.safetensors"
# Position in torchvision's `features`: (in, out, kernel, stride, padding); every one is followed by a ReLU.
CONVOLUTIONS = {
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
CHANNEL_SHIFT = (-0.030, -0.088, -0.188)  # LPIPS's scaling of inputs in [-1, 1], per colour
CHANNEL_SCALE = (0.458, 0.448, 0.450)
LENGTH_EPSILON = 1e-10


class LpipsUnavailableError(ERTACacheError):
    """The trunk's weights are missing; the message is short enough for a table."""


def alexnet_features() -> nn.Sequential:
    """AlexNet's convolutions up to the fifth ReLU, with torchvision's state dict keys."""
    layers: list[nn.Module] = []
    while len(layers) < max(CONVOLUTIONS) + 2:
        position = len(layers)
        if position in CONVOLUTIONS:
            channels_in, channels_out, kernel, stride, padding = CONVOLUTIONS[position]
            layers += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding), nn.ReLU()]
        else:
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2))
    return nn.Sequential(*layers)


class Lpips(nn.Module):
    """LPIPS: `features` is the trunk, `linear` the weights w_l, buffers of shape (1, channels, 1, 1)."""

    shift: Tensor  # (1, 3, 1, 1), like scale
    scale: Tensor

    def __init__(self, trunk: dict[str, Tensor], linear: dict[str, Tensor]):
        super().__init__()
        self.features = alexnet_features()
        self.features.load_state_dict({key.removeprefix("features."): value for key, value in trunk.items()})
        self.num_layers = len(CONVOLUTIONS)
        for i in range(self.num_layers):
            self.register_buffer(f"linear_{i}", linear[f"lin{i}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(CHANNEL_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(CHANNEL_SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Distance between pictures or videos.

        Args:
            image: (n, 3, H, W) or (n, F, 3, H, W) in [0, 1]; H and W at least 35.
            reference: the same shape.

        Returns:
            (n,) float32, 0 for identical items; for a video the mean over its frames.

        Raises:
            ValueError: the shapes differ.
        """
        if image.shape != reference.shape:
            raise ValueError(f"shapes differ: {tuple(image.shape)} and {tuple(reference.shape)}")
        if image.ndim == 5:  # frame by frame, so that a long video needs no more memory than a picture
            return torch.stack([self(a, b).mean() for a, b in zip(image, reference, strict=True)])
        ours, theirs = self._unit_features(image), self._unit_features(reference)
        distance = image.new_zeros(len(image), dtype=torch.float32)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            weighted = (a - b).square() * getattr(self, f"linear_{i}")  # (n, channels, h, w)
            distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance

    def _unit_features(self, image: Tensor) -> list[Tensor]:
        """Outputs of the five ReLUs, each (n, channels, h, w), of unit length across channels."""
        values = (2 * image.float() - 1 - self.shift) / self.scale
        taps = []
        for layer in self.features:
            values = layer(values)
            if isinstance(layer, nn.ReLU):
                length = values.square().sum(dim=1, keepdim=True).sqrt()
                taps.append(values / (length + LENGTH_EPSILON))
        return taps


def load_lpips(trunk: Path | str | None = None) -> Lpips:
    """Load the metric, with the trunk from `trunk`, else ERTACACHE_LPIPS_TRUNK, else torchvision.

    Raises:
        LpipsUnavailableError: no trunk, or a file that holds none; the message says which and what to do.
    """
    named = trunk or os.environ.get(TRUNK_VARIABLE)
    weights = _trunk_from_file(Path(named)) if named else _trunk_from_torchvision()
    try:
        return Lpips(weights, load_file(LINEAR_FILE))
    except RuntimeError as error:
        raise LpipsUnavailableError(f"{named or 'torchvision'} holds no AlexNet trunk: {error}") from error


def _trunk_from_file(path: Path) -> dict[str, Tensor]:
    """Read the `features.*` tensors of a safetensors or torch file (tensors only, no pickled code)."""
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:  # safetensors and torch have no common base class for an unreadable file
        raise LpipsUnavailableError(f"cannot read the LPIPS trunk {path}: {error}") from error
    return {key: value for key, value in weights.items() if key.startswith("features.")}


def _trunk_from_torchvision() -> dict[str, Tensor]:
    try:
        from torchvision.models import AlexNet_Weights, alexnet
    except (ImportError, RuntimeError) as error:  # RuntimeError: installed, but for another torch
        raise LpipsUnavailableError(
            f"LPIPS not measured: name AlexNet's weights in {TRUNK_VARIABLE} or install torchvision ({error})"
        ) from error
    try:
        model = alexnet(weights=AlexNet_Weights.IMAGENET1K_V1)
    except OSError as error:  # no network, or no room
        raise LpipsUnavailableError(f"LPIPS not measured: torchvision cannot fetch AlexNet: {error}") from error
    return {f"features.{key}": value for key, value in model.features.state_dict().items()}
