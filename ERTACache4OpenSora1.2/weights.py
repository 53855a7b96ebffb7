"""The official weights of Open-Sora 1.2, which lie in three repositories."""

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from opensora12 import OpenSoraPipeline
from transformer import CachedSTDiT3

from ertacache.cli.models import ModelError, place
from ertacache.cli.settings import Settings

PIPELINE_INDEX = "model_index.json"
WEIGHTS = ("model.safetensors", "model.safetensors", "config.json")  # the text encoder's come in shards


def repositories(chosen: Settings, transformer: str) -> tuple[str, str, str]:
    """Denoiser, autoencoder and text encoder, each a hub id or folder."""
    return transformer, chosen.vae_model, chosen.text_model


def needed_files(chosen: Settings) -> list[tuple[str, str]]:
    """(hub id, file) of what `auto` wants to find in the local cache before it takes the real model."""
    files = zip(repositories(chosen, chosen.real_model), WEIGHTS, strict=True)
    return [(name, file) for name, file in files if not Path(name).exists()]


def official_layout(source: str) -> bool:
    """Whether a folder or hub id is the official denoiser's, and not a whole pipeline in diffusers' format."""
    if Path(source).exists():
        return not Path(source, PIPELINE_INDEX).is_file() and Path(source, "config.json").is_file()
    if source.startswith((".", "/")):
        return False
    try:
        hf_hub_download(source, PIPELINE_INDEX)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError):
        return True
    return False


def load_official(chosen: Settings, transformer: str) -> OpenSoraPipeline:
    """The pipeline of the three repositories, in the configured dtype, on the device.

    Raises:
        ModelError: one of them cannot be loaded; names all three downloads.
    """
    names = repositories(chosen, transformer)
    try:
        pipe = OpenSoraPipeline.from_official(
            *names, dtype=getattr(torch, chosen.dtype), transformer_class=CachedSTDiT3
        )
    except Exception as error:  # diffusers, transformers and the hub client raise many kinds; all mean: not loaded
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        commands = ", ".join(f"`../.venv/bin/hf download {name}`" for name in names)
        raise ModelError(
            f"model {transformer} cannot be loaded ({first}). Open-Sora 1.2 needs three downloads: {commands}. Without "
            "them: --model tiny"
        ) from error
    return place(pipe, chosen)
