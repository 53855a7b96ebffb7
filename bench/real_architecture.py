"""What builds an architecture at its real setting, whole or cut down, with random weights; real_models.py has them.

Timing does not depend on the weights' values. `layers` is the fraction of each kind of block that is kept, `scale`
the fraction of height and width.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from record import ROOT

CPU = torch.device("cpu")
SIDE_MULTIPLE = 16  # pixels: 8 of the VAE, 2 of the patches


@dataclass(frozen=True)
class Request:
    """What is built and asked for; sizes in pixels and frames, fractions of the real model's (None: left open).

    `width` is the fraction of the attention heads.
    """

    layers: float | None = 1.0
    scale: float | None = 1.0
    frames: int | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    width: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether nothing is cut down."""
        return self.layers == self.scale == self.width == 1 and self.frames is None


@dataclass(frozen=True)
class Reduced:
    """What a CPU is given where nothing is said: minutes on two cores, and a few GB in float32."""

    layers: float
    scale: float
    steps: tuple[int, ...]
    frames: int | None = None


@dataclass(frozen=True)
class RealModel:
    """One architecture at its real setting.

    Attributes:
        size: height and width in pixels, and frames of videos.
        steps: numbers of scheduler steps that it is used with.
        dtype: that it runs in on a GPU.
        branches: transformer samples of a step: 2 with guidance, in one call or in two.
        build: (request, size) -> pipeline.
        embeddings: (device, dtype) -> arguments of the pipeline in place of a prompt, guidance included.
        reduced: see there.
    """

    name: str
    size: dict[str, int]
    steps: tuple[int, ...]
    dtype: torch.dtype
    branches: int
    build: Callable[[Request, dict[str, int]], Any]
    embeddings: Callable[[torch.device, torch.dtype], dict[str, Any]]
    reduced: Reduced

    def sized(self, request: Request) -> dict[str, int]:
        """height, width and num_frames at the request's scale, rounded to what the pipeline takes."""
        size = {
            name: max(SIDE_MULTIPLE, round(value * request.scale / SIDE_MULTIPLE) * SIDE_MULTIPLE)
            if request.scale != 1
            else value
            for name, value in self.size.items()
            if name != "num_frames"
        }
        if "num_frames" in self.size:
            size["num_frames"] = request.frames or self.size["num_frames"]
        return size

    def pipeline(self, request: Request) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and the arguments of its call beside num_inference_steps and generator."""
        size = self.sized(request)
        pipe = self.build(request, size)
        pipe.set_progress_bar_config(disable=True)
        return pipe, {**size, **self.embeddings(request.device, request.dtype), "output_type": "latent"}


def kept(count: int, fraction: float) -> int:
    """How many of `count` blocks or heads are kept: at least one."""
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction is {fraction}: it must be above 0 and at most 1")
    return max(1, round(count * fraction))


@contextmanager
def created_on(request: Request) -> Iterator[None]:
    """Parameters are made on the device and in the dtype at once: twelve billion in float32 fit few machines."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.dtype)
    try:
        with torch.device(request.device):
            yield
    finally:
        torch.set_default_dtype(before)


def made(kind: type, request: Request, **config: Any) -> Any:
    """A transformer of random weights, for inference."""
    torch.manual_seed(0)
    with created_on(request):
        model = kind(**config)
    # also what is made in float32 whatever the default, as loading a checkpoint in the dtype would
    return model.to(request.device, request.dtype).eval().requires_grad_(False)


def folder_module(folder: str, name: str) -> ModuleType:
    """A module of a model folder under a name of its own, since folders have files of the same names."""
    unique = f"{folder}_{name}".replace(".", "_")
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, ROOT / folder / f"{name}.py")
        sys.modules[unique] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[unique])
    return sys.modules[unique]


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random embeddings; the same for the same shape."""
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)
