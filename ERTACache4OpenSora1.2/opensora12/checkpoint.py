"""Loads the official repositories, which hold one `model.safetensors` where diffusers looks for another name."""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file

logger = logging.get_logger(__name__)

WEIGHTS = "model.safetensors"
# of a configuration, that say how it was saved; diffusers would pass them on to __init__
SAVED_WITH = ("dtype", "torch_dtype", "quantization_config")
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class OfficialLayout:
    """Mixin before `ModelMixin`: `from_pretrained` reads the official layout as well as diffusers' own.

    Attributes:
        official: what the original sets whatever an official configuration says.
    """

    official: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Self:
        """Load a folder or hub repository that holds config.json and weights, in evaluation mode.

        Args:
            source: a folder or hub id with model.safetensors (official layout) or what diffusers saves.
            kwargs: diffusers' own; of them the official layout reads dtype (or torch_dtype), subfolder and
                the hub's arguments.

        Raises:
            ValueError: tensors are missing in the official file.
        """
        subfolder = kwargs.get("subfolder") or ""
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        weights = _official_weights(str(source), subfolder, hub)
        if weights is None:
            return super().from_pretrained(source, **kwargs)
        found = cls.load_config(source, subfolder=subfolder or None, **hub)
        config = {key: value for key, value in found.items() if key not in SAVED_WITH} | cls.official
        with torch.device("meta"):
            model = cls.from_config(config)
        _assign(model, load_file(weights), weights)
        model = model.to(kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32)
        return model.eval()


def _official_weights(source: str, subfolder: str, hub: dict[str, Any]) -> str | None:
    """Path of model.safetensors; None where diffusers' own layout is to be read."""
    if Path(source).exists():
        path = Path(source, subfolder, WEIGHTS)
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(source, WEIGHTS, subfolder=subfolder or None, **hub)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError):
        return None  # diffusers tries its own names next, and says what is wrong if they fail too


def _assign(model: torch.nn.Module, tensors: dict[str, torch.Tensor], path: str) -> None:
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    if unexpected:
        logger.warning(f"{path} has {len(unexpected)} tensors that are not used, first {unexpected[0]}")
