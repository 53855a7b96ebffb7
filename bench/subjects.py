"""What latency.py measures: a real architecture, or a folder's tiny pipeline, with calibrations for both."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from real_architecture import Request
from real_models import MODELS
from step_timer import Call
from synthetic import grid_and_shape, synthetic_calibration
from tiny_pipelines import FOLDERS, kept_counts, subject_name, tiny_calibration, tiny_pipeline

from ertacache.calibration import Calibration, computed_steps_for

SPEEDUPS = (1.5, 2.0, 3.0)
PROMPT = "a large red star at the left"


@dataclass
class Subject:
    """A pipeline that is measured.

    Attributes:
        name: of the result, without what all results of latency.py begin with.
        record: what the result says about it.
        steps: numbers of scheduler steps to measure.
        counts: of computed steps, for a number of scheduler steps.
        calibration: (the run's call, scheduler steps, computed steps) -> a calibration for it.
    """

    name: str
    pipe: Any
    arguments: dict[str, Any]
    record: dict[str, Any]
    steps: list[int]
    counts: Callable[[int], list[int]]
    calibration: Callable[[Call, int, int], Calibration]
    device: torch.device
    dtype: torch.dtype


def caller(pipe: Any, arguments: dict[str, Any], steps: int, device: str = "cpu") -> Call:
    """A function that runs the pipeline to its latents, the same ones every time, of noise drawn on `device`."""

    def call(**overrides: Any) -> Any:
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            return pipe(num_inference_steps=steps, generator=generator, **{**arguments, **overrides})

    return call


def usual_counts(steps: int) -> list[int]:
    """Computed steps for the usual speed-ups, each once."""
    return list(dict.fromkeys(computed_steps_for(steps, speedup) for speedup in SPEEDUPS))


def real_subject(name: str, request: Request, steps: list[int] | None, computed: list[int] | None) -> Subject:
    """A real architecture; cut down to what the model says for a CPU where the request leaves it open."""
    model, halving = MODELS[name], False
    if request.device.type == "cpu" and request.layers is request.scale is None:
        frames = request.frames or model.reduced.frames
        request = replace(request, layers=model.reduced.layers, scale=model.reduced.scale, frames=frames)
        steps, halving = steps or list(model.reduced.steps), True
        said = f"--layers {request.layers:g} --scale {request.scale:g} --steps {' '.join(map(str, steps))}"
        said += f" --frames {frames}" if frames else ""
        print(f"{name}: on a CPU reduced to {said}; all of it: --layers 1 --scale 1", file=sys.stderr)
    request = replace(request, layers=request.layers or 1.0, scale=request.scale or 1.0)
    pipe, arguments = model.pipeline(request)
    record = {
        "model": model.name,
        "weights": "random",
        "branches": model.branches,
        "layers_fraction": request.layers,
        "scale": request.scale,
        "full_size": request.whole,
        "size": model.sized(request),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
    }

    def calibration(call: Call, steps: int, count: int) -> Calibration:
        timesteps, sigmas, shape, _ = grid_and_shape(pipe, call)
        return synthetic_calibration(pipe, timesteps, sigmas, shape, count)

    return Subject(
        f"{name}_{request.device.type}_{'full' if request.whole else 'reduced'}",
        pipe,
        arguments,
        record,
        steps or list(model.steps),
        lambda steps: computed or ([steps // 2] if halving else usual_counts(steps)),
        calibration,
        request.device,
        request.dtype,
    )


def tiny_subject(name: str, computed: list[int] | None) -> Subject | None:
    """A folder's tiny pipeline with the calibrations that lie there; None, and why is said, where there is nothing."""
    folder = FOLDERS.get(name)
    if folder is None or not (folder / "tiny" / "model_index.json").exists():
        print(f"{name}: no tiny pipeline", file=sys.stderr)
        return None
    pipe, chosen, module = tiny_pipeline(name)
    arguments = {"prompt": PROMPT, "output_type": "latent", **module.MODEL_FOLDER.arguments(chosen)}
    steps = arguments.pop("num_inference_steps")
    computed = computed or kept_counts(pipe, chosen, module)
    if not computed:
        print(f"{name}: no calibration of {folder.name}'s tiny pipeline; --computed makes one", file=sys.stderr)
        return None
    record = {
        "model": subject_name(name),
        "weights": "trained",
        "branches": MODELS[name].branches,
        "full_size": False,
        "size": {key: arguments[key] for key in ("height", "width", "num_frames") if key in arguments},
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
    }
    return Subject(
        f"{name}_tiny",
        pipe,
        arguments,
        record,
        [steps],
        lambda _: computed,
        lambda _, __, count: tiny_calibration(pipe, chosen, module, count),
        torch.device("cpu"),
        torch.float32,
    )
