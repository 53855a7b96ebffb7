"""Identify a model and a run: class, configuration hash, weights fingerprint, versions."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ertacache._version import __version__
from ertacache.attach import CachedTransformer
from ertacache.intercept import uncompiled

FINGERPRINT_VALUES = 4  # of every parameter: a LoRA or a fine-tuning may change a few of them only
VERSIONED = ("torch", "diffusers", "transformers")


def model_identity(transformer: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Return id, class, config_sha256 and weights_fingerprint (None if the weights are not in memory)."""
    return {
        "id": name or model_name(transformer),
        "class": class_name(transformer),
        "config_sha256": config_hash(transformer),
        "weights_fingerprint": weights_fingerprint(transformer),
    }


def class_name(model: nn.Module) -> str:
    """Name of the model's class, seen through torch.compile's wrapper and a folder's caching subclass."""
    model = uncompiled(model)
    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, CachedTransformer))


def model_name(model: Any) -> str | None:
    """The hub id that a model was loaded from, or the last two parts of a local folder."""
    path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if path and Path(path).exists():
        return "/".join(Path(path).resolve().parts[-2:])
    return path


def model_dtype(model: nn.Module) -> str:
    """The dtype that a model runs in: its `dtype`, or that of its first parameter."""
    dtype = getattr(model, "dtype", None) or next((p.dtype for p in model.parameters()), torch.float32)
    return str(dtype).removeprefix("torch.")


def config_hash(model: Any) -> str | None:
    """sha256 of the configuration, without private keys and quantisation."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    public = {k: v for k, v in dict(config).items() if not k.startswith("_") and k != "quantization_config"}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str | None:
    """Hash a few values of every parameter; changes with a LoRA, quantisation or fine-tuning.

    The same in memory, offloaded by accelerate, and compiled; None if the weights are out of reach. Reads once from
    each device.
    """
    model = uncompiled(model)
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    digest = hashlib.sha256(str(len(named)).encode())
    samples: list[torch.Tensor] = []
    for name, parameter in named:
        values = _offloaded(model, name) if parameter.is_meta else parameter.detach()
        if values is None:
            return None
        digest.update(f"{name} {tuple(values.shape)}".encode())
        if type(values) is not torch.Tensor and type(values) is not nn.Parameter:
            digest.update(type(values).__name__.encode())  # quantised: its numbers are packed
            continue
        samples.append(_sample(values))
    for values in _on_host(samples):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(values: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES].to(torch.float32)


def _on_host(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copy to the host in the same order, with one transfer per device."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    for device in {sample.device for sample in samples}:
        places = [i for i, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[i] for i in places]).cpu()
        for i, piece in zip(places, joined.split([len(samples[i]) for i in places]), strict=True):
            found[i] = piece
    return found


def _offloaded(model: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter that accelerate keeps on the host while its module holds an empty one."""
    path, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for part in [hook, *getattr(hook, "hooks", ())]:
        weights = getattr(part, "weights_map", None)
        if weights is not None and leaf in weights:
            return weights[leaf]
    return None


def prompts_hash(prompts: Sequence[str], seeds: Sequence[int] = ()) -> str:
    """sha256 of prompts and seeds in order."""
    return hashlib.sha256(json.dumps([list(prompts), list(seeds)]).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on; our own from the code, since a checkout need not be installed."""
    found = {"ertacache": __version__}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
