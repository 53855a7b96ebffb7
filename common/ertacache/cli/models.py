"""Choose and load the model: the tiny pipeline, a named one, or the real one if it can run here."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ertacache.cli.settings import Settings, apply_overrides
from ertacache.errors import ERTACacheError, UsageError


class ModelError(ERTACacheError, RuntimeError):
    """A model cannot be loaded."""


def choose(settings: Settings, needed_files: Sequence[tuple[str, str]] = ()) -> str:
    """Resolve `settings.model` to a folder or hub id, apply the tiny pipeline's overrides, and say so.

    `auto` takes the real model if a CUDA device has the memory and the weights are in the local cache; it never
    downloads.

    Args:
        needed_files: (hub id, file) that stand for the weights; by default the real model's model_index.json.
    """
    tiny = settings.folder / "tiny"
    if settings.model == "auto":
        reason = why_not_real(settings, needed_files)
        settings.model = "tiny" if reason else settings.real_model
        if reason:
            print(
                f"model: embedded tiny pipeline ({reason}; the real one: --model {settings.real_model})",
                file=sys.stderr,
            )
        else:
            print(
                f"model: {settings.real_model} from the local cache (the tiny pipeline: --model tiny)", file=sys.stderr
            )
    if settings.model == "tiny":
        apply_overrides(settings, tiny / "config.py")
        return str(tiny)
    return settings.model


def why_not_real(settings: Settings, needed_files: Sequence[tuple[str, str]] = ()) -> str | None:
    """Say in a few words why the real model cannot run here without a download; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < settings.real_model_gib:
        return f"the GPU has {memory:.0f} of the {settings.real_model_gib} GiB needed"
    from huggingface_hub import try_to_load_from_cache

    for repository, file in needed_files or [(settings.real_model, "model_index.json")]:
        if not isinstance(try_to_load_from_cache(repository, file), str):
            return f"{repository} is not in the local cache"
    return None


def load_pipeline(
    pipeline_class: Any, transformer_class: Any, source: str, settings: Settings, float32_parts: Sequence[str] = ()
) -> Any:
    """`pipeline_class.from_pretrained(source)` in the configured dtype, on the device, offloaded as configured.

    Args:
        transformer_class: of its transformer: the folder's own, whose forward asks whether a step is reused.
        float32_parts: components that stay in float32 whatever the dtype, such as a VAE that needs it.

    Raises ModelError: nothing to load there, or no access; says what to do.
    """
    path = Path(source)
    if source.startswith((".", "/")) and not path.exists():
        raise ModelError(f"model folder {source} does not exist: give a folder with a model_index.json or a hub id")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"{source} holds no model_index.json: it is not a diffusers pipeline folder")
    dtype: Any = getattr(torch, settings.dtype)
    parts: Any = {"default": dtype, **dict.fromkeys(float32_parts, torch.float32)} if float32_parts else dtype
    try:
        transformer = transformer_class.from_pretrained(source, subfolder="transformer", dtype=dtype)
        pipe = pipeline_class.from_pretrained(source, transformer=transformer, dtype=parts)
    except Exception as error:  # diffusers and the hub client raise many kinds here; all mean: not loaded
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"model {source} cannot be loaded ({first}); check the name, accept its licence on the hub and log in with "
            "`../.venv/bin/hf auth login`, or use --model tiny"
        ) from error
    return place(pipe, settings)


def place(pipe: Any, settings: Settings) -> Any:
    """Move a pipeline to the device, or set up offloading as configured."""
    if not torch.cuda.is_available():
        if settings.offload != "none":
            raise UsageError("--offload needs a CUDA device")
        return pipe.to("cpu")
    own = torch.cuda.current_device()  # one of several processes has a device of its own
    if settings.offload == "model":
        pipe.enable_model_cpu_offload(gpu_id=own)
    elif settings.offload == "sequential":
        pipe.enable_sequential_cpu_offload(gpu_id=own)
    else:
        pipe.to("cuda")
    return pipe
