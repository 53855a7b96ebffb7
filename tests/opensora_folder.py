"""What the tests of the Open-Sora folder share: its modules, a saved pipeline, and short runs. Holds no test."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tiny_opensora import FOLDER, FRAMES, SIDE, generator, tiny_pipeline
from torch import Tensor

MODULES = ("generate", "transformer", "sizes", "weights")  # other folders have files of the same names
SMALL = {"height": SIDE, "width": SIDE, "num_frames": FRAMES}
NUM_STEPS = 8
PROMPTS = ["a red cat runs", "a dog jumps", "a blue dog", "a red dog runs and jumps"]


@contextmanager
def folder_modules() -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder by name; those of other folders are back in place afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name, kept in before.items():
            sys.modules.pop(name, None)
            if kept is not None:
                sys.modules[name] = kept


def pipeline(seed: int = 0) -> Any:
    return tiny_pipeline(seed)


def call(pipe: Any, prompt: str = "a blue cat", seed: int = 50, **overrides: Any) -> Tensor:
    """Latents (1, 4, 5, 8, 8) of a prompt that no test calibrates on."""
    arguments = {**SMALL, "num_inference_steps": NUM_STEPS, "output_type": "latent", **overrides}
    return pipe(prompt, generator=generator(seed), **arguments).frames
