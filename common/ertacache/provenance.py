"""What identifies a model and a run: class, configuration hash, weights fingerprint, versions."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ertacache.attach import CachedTransformer

FINGERPRINT_TENSORS = 24
FINGERPRINT_VALUES = 64
VERSIONED = ("ertacache", "torch", "diffusers", "transformers")


def model_identity(transformer: nn.Module, name: str | None = None) -> dict[str, Any]:
    """id, class, config_sha256 and weights_fingerprint (None where the weights are not in memory)."""
    return {
        "id": name or model_name(transformer),
        "class": class_name(transformer),
        "config_sha256": config_hash(transformer),
        "weights_fingerprint": weights_fingerprint(transformer),
    }


def class_name(model: nn.Module) -> str:
    """The model's class, without the mixin that reuses its output."""
    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, CachedTransformer))


def model_name(model: Any) -> str | None:
    """The hub id that a model was loaded from; of a local folder the last two parts only."""
    path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if path and Path(path).exists():
        return "/".join(Path(path).resolve().parts[-2:])
    return path


def model_dtype(model: nn.Module) -> str:
    """The dtype that a model runs in: its own word for it, or that of its first parameter."""
    dtype = getattr(model, "dtype", None) or next((p.dtype for p in model.parameters()), torch.float32)
    return str(dtype).removeprefix("torch.")


def config_hash(model: Any) -> str | None:
    """sha256 of the configuration without private keys and without how it is quantised."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    public = {k: v for k, v in dict(config).items() if not k.startswith("_") and k != "quantization_config"}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str | None:
    """A cheap hash of a few values of a few parameters; changes with a LoRA, quantisation or fine-tuning."""
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    stride = max(1, len(named) // FINGERPRINT_TENSORS)
    digest = hashlib.sha256(str(len(named)).encode())
    for name, parameter in named[::stride]:
        if parameter.is_meta:
            return None
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES]
        digest.update(name.encode())
        digest.update(values.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def prompts_hash(prompts: Sequence[str], seeds: Sequence[int] = ()) -> str:
    """sha256 of prompts and seeds in order."""
    return hashlib.sha256(json.dumps([list(prompts), list(seeds)]).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
