"""Identify a model and a run: class, configuration hash, weights fingerprint, versions."""

import functools
import hashlib
import inspect
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ertacache._version import __version__
from ertacache.attach import CachedTransformer, networks_of
from ertacache.intercept import FOLLOWED, uncompiled
from ertacache.solver import config_of

FINGERPRINT_VALUES = 4  # of every parameter: a LoRA or a fine-tuning may change a few of them only
VERSIONED = ("torch", "diffusers", "transformers")
PLAIN = (bool, int, float, str, type(None))


def model_identity(transformer: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Return id, class, config_sha256 and weights_fingerprint (None if the weights are not in memory)."""
    return {
        "id": name or model_name(transformer),
        "class": class_name(transformer),
        "config_sha256": config_hash(transformer),
        "weights_fingerprint": weights_fingerprint(transformer),
    }


def pipeline_identity(pipe: Any) -> dict[str, Any]:
    """Return class, config and the identity of each network beside `transformer`."""
    networks = {name: part for name, part in networks_of(pipe).items() if name != "transformer"}
    return {**pipeline_facts(pipe), "networks": {name: model_identity(part) for name, part in networks.items()}}


def pipeline_facts(pipe: Any) -> dict[str, Any]:
    """Return the class and the plain config values of a pipeline, guiders' among them."""
    config = config_of(pipe) or {}
    for name, part in vars(pipe).items():
        if "guider" in name and hasattr(part, "config"):
            config |= {f"{name}.{key}": value for key, value in (config_of(part) or {}).items()}
    return {
        "class": getattr(vars(type(pipe)).get(FOLLOWED, type(pipe)), "__name__", None),
        "config": {key: value for key, value in sorted(config.items()) if isinstance(value, PLAIN)},
    }


def arguments_of(pipe: Any, args: tuple | None, kwargs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the plain arguments of a pipeline's call and their defaults, by name; none for args None."""
    if args is None:
        return {}
    kind: Any = type(pipe)
    parameters = _parameters(kind)
    names = [name for name, kind, _ in parameters if kind is not inspect.Parameter.VAR_KEYWORD]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    found = {name: (given.pop(name, default), default) for name, _, default in parameters if name in names}
    # a modular pipeline's call takes any, and its blocks know their defaults
    inputs = {one.name: one.default for one in getattr(getattr(pipe, "blocks", None), "inputs", ())}
    found |= {name: (given.get(name, inputs.get(name)), inputs.get(name)) for name in {**inputs, **given} if name}
    kept = {name: (as_plain(name, value), as_plain(name, default)) for name, (value, default) in found.items()}
    return {name: pair for name, pair in kept.items() if all(isinstance(value, PLAIN) for value in pair)}


def as_plain(name: str, value: Any) -> Any:
    """An argument as a file keeps it: a dictionary of numbers, or a list of them for guidance, as a text."""
    several = isinstance(value, dict) or (isinstance(value, (list, tuple)) and "guidance" in name)
    items = value.values() if isinstance(value, dict) else value
    plain = several and all(isinstance(item, (int, float)) for item in items)
    return (json.dumps(value, sort_keys=True) if value else None) if plain else value


@functools.cache
def _parameters(pipeline_class: type) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of what a pipeline's call takes by name; binding a signature at every run takes longer."""
    parameters = list(inspect.signature(pipeline_class.__call__).parameters.values())[1:]
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return [(p.name, p.kind, None if p.default is p.empty else p.default) for p in named]


def class_name(model: nn.Module) -> str:
    """Name of the model's class, seen through torch.compile's wrapper and a folder's caching subclass."""
    model = uncompiled(model)
    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, CachedTransformer))


def model_name(model: Any) -> str | None:
    """The hub id that a model was loaded from, or the last two parts of a local folder."""
    config = getattr(model, "config", None)
    path = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not isinstance(path, str) or not path:
        return None
    if path and Path(path).exists():
        return "/".join(Path(path).resolve().parts[-2:])
    return path


def model_dtype(model: nn.Module) -> str:
    """The dtype that a model runs in: its `dtype`, or that of its first parameter."""
    dtype = getattr(model, "dtype", None) or next((p.dtype for p in model.parameters()), torch.float32)
    return str(dtype).removeprefix("torch.")


def config_hash(model: Any) -> str | None:
    """sha256 of the configuration, without private keys and how it was saved; None where it has none."""
    config = config_of(model)
    if config is None:
        return None
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=_text).encode()).hexdigest()


def _text(value: Any) -> str:
    """An object of a configuration, without its place in memory."""
    return type(value).__name__ if " at 0x" in str(value) else str(value)


def weights_fingerprint(model: nn.Module, adapters: bool = True) -> str | None:
    """Hash a few values of every effective weight; changes with an active LoRA, quantisation or fine-tuning.

    The same in memory, offloaded by accelerate, and compiled, whatever an adapter is called and whether it is fused;
    None if the weights are out of reach. Reads once from each device.

    Args:
        adapters: whether those that lie beside the weights count.
    """
    return _fingerprint(model, effective=True, adapters=adapters)


def weights_state(model: nn.Module) -> str | None:
    """A hash that changes whenever the effective weights may have changed; cheaper than their fingerprint."""
    return _fingerprint(model, effective=False)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers beside whose weights adapters lie, by name."""
    return {name: layer for name, layer in uncompiled(model).named_modules() if hasattr(layer, "base_layer")}


def _fingerprint(model: nn.Module, effective: bool, adapters: bool = True) -> str | None:
    model, adapted = uncompiled(model), adapted_layers(model)
    named = dict(model.named_parameters())
    digest, samples = hashlib.sha256(), []
    if effective and adapted:
        base = {name: p for name, p in named.items() if not _belongs_to_adapter(name, adapted)}
        named = {name.replace(".base_layer.", "."): p for name, p in base.items()}
    elif adapted:
        digest.update(repr([_adapter_state(layer) for _, layer in sorted(adapted.items())]).encode())
    scales = [str(part.scale) for part in model.modules() if hasattr(part, "to_k_ip") and hasattr(part, "scale")]
    digest.update(f"{len(named)}{scales or ''}".encode())  # of IP-Adapters
    for name, parameter in sorted(named.items()):
        values = _offloaded(model, name) if parameter.is_meta else parameter.detach()
        if values is None:
            return None
        digest.update(f"{name} {tuple(values.shape)}".encode())
        if type(values) is not torch.Tensor and type(values) is not nn.Parameter:
            digest.update(type(values).__name__.encode())  # quantised: its numbers are packed
            continue
        path, _, leaf = name.rpartition(".")
        if effective and adapters and path in adapted and leaf == "weight":
            values = _with_adapters(adapted[path], values)
        samples.append(_sample(values))
    for values in _on_host(samples):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def _belongs_to_adapter(name: str, adapted: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{p}.") and not name.startswith(f"{p}.base_layer.") for p in adapted)


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    """Which adapters of one of peft's layers take part, and how much."""
    scaling = sorted(dict(getattr(layer, "scaling", {})).items())
    merged, active = list(getattr(layer, "merged_adapters", [])), list(getattr(layer, "active_adapters", []))
    return scaling, merged, active, bool(getattr(layer, "disable_adapters", False))


def _with_adapters(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight with the adapters that are active and not in it yet, as fusing would add them."""
    _, merged, active, disabled = _adapter_state(layer)
    if disabled:
        active = []
    for adapter in active:
        if adapter not in merged and adapter in getattr(layer, "lora_A", active):
            weight = weight + layer.get_delta_weight(adapter).detach().to(weight)
    if disabled:  # calls take out again what was fused
        for adapter in merged:
            weight = weight - layer.get_delta_weight(adapter).detach().to(weight)
    return weight


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


def prompts_hash(prompts: Sequence[str | None], seeds: Sequence[int] = ()) -> str:
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
