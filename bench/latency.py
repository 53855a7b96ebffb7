"""Do saved steps become saved seconds? Times uncached and cached denoising loops of the real architectures.

    python bench/latency.py flux --device cuda                       full size: random weights, no download
    python bench/latency.py wan --layers 0.04 --scale 0.25 --steps 6 a thirtieth of the blocks, a sixteenth of the area
    python bench/latency.py flux --tiny                              the folder's trained tiny pipeline, its calibration
    python bench/latency.py flux --memory                            also what each cache holds
    python bench/latency.py flux --device cuda --checks              also syncs, CUDA graphs, torch.compile

With OMP_NUM_THREADS=1 on a CPU the times are those of the processor, which other work on the machine leaves alone.
Writes bench/results/latency_<model>_<device or tiny>.json. The uncached and the cached runs take turns; the first of
each warms up and is not counted.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from real_models import MODELS, RealModel, Request
from record import RESULTS, machine, write
from step_timer import Call, Timings, clock_of, compare, time_run
from synthetic import grid_and_shape, synthetic_calibration
from tiny_pipelines import FOLDERS, tiny_calibration, tiny_pipeline

import ertacache
from ertacache import policy
from ertacache.calibration import Calibration

SPEEDUPS = (1.5, 2.0, 3.0)


def measure(pipe: Any, call: Call, calibration: Calibration, repeats: int, device: torch.device) -> dict[str, Any]:
    """Interleaved uncached and cached runs; see `step_timer.compare` for what comes out."""
    uncached: list[Timings] = []
    cached: list[Timings] = []
    for _ in range(repeats + 1):
        uncached.append(time_run(pipe, call, device))
        with ertacache.apply(pipe, calibration):
            cached.append(time_run(pipe, call, device))
    return compare(uncached[1:], cached[1:], calibration.computed_steps)


def caller(pipe: Any, arguments: dict[str, Any], steps: int) -> Call:
    """A function that runs the pipeline to its latents, the same ones every time."""

    def call(**overrides: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad():
            return pipe(num_inference_steps=steps, generator=generator, **{**arguments, **overrides})

    return call


def real_rows(model: RealModel, request: Request, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured on one real architecture."""
    pipe, arguments = model.pipeline(request)
    record: dict[str, Any] = {
        "model": model.name,
        "weights": "random",
        "layers_fraction": request.layers,
        "scale": request.scale,
        "full_size": request.layers == request.scale == 1 and request.frames is None,
        "size": model.sized(request),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "rows": [],
    }
    for steps in options.steps or model.steps:
        call = caller(pipe, arguments, steps)
        timesteps, sigmas, shape, output_bytes = grid_and_shape(pipe, call)
        counts = options.computed or [policy.computed_steps_for(steps, s) for s in SPEEDUPS]
        for count in counts:
            made = synthetic_calibration(pipe, timesteps, sigmas, shape, count)
            record["rows"].append(measure(pipe, call, made, options.repeats, request.device))
            print(_line(model.name, record["rows"][-1]), file=sys.stderr)
        record["latent_shape"], record["output_bytes"] = shape, output_bytes
    if options.memory:
        from held_memory import compare_memory

        record["memory"] = compare_memory(pipe, call, made, output_bytes, request.device)
    if options.checks:
        from device_checks import run_checks

        record["checks"] = run_checks(pipe, call, made, request.device)
    return record


def tiny_rows(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same on the trained tiny pipeline of a folder, with the calibrations that lie there."""
    pipe, chosen, module = tiny_pipeline(name)
    arguments = {"prompt": "a large red star at the left", **module.MODEL_FOLDER.arguments(chosen)}
    steps = arguments.pop("num_inference_steps")
    call = caller(pipe, {**arguments, "output_type": "latent"}, steps)
    record: dict[str, Any] = {
        "model": f"{MODELS[name].name} tiny",
        "weights": "trained",
        "full_size": False,
        "size": {key: arguments[key] for key in ("height", "width", "num_frames") if key in arguments},
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "rows": [],
    }
    for count in options.computed or [policy.computed_steps_for(steps, s) for s in SPEEDUPS]:
        made = tiny_calibration(pipe, chosen, module, count)
        record["rows"].append(measure(pipe, call, made, options.repeats, torch.device("cpu")))
        print(_line(record["model"], record["rows"][-1]), file=sys.stderr)
    if options.memory:
        from held_memory import compare_memory

        *_, record["latent_shape"], record["output_bytes"] = grid_and_shape(pipe, call)
        record["memory"] = compare_memory(pipe, call, made, record["output_bytes"], torch.device("cpu"))
    return record


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name}: {len(row['computed_steps'])} of {row['num_inference_steps']} steps, "
        f"{row['uncached_seconds']:.3g} s -> {row['cached_seconds']:.3g} s, "
        f"{row['speedup']:.2f}x of {row['ideal_speedup']:.2f}x ({row['realised_over_ideal']:.3f}), "
        f"a reused step {row['reused_percent_of_computed']:.2f} %"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--tiny", action="store_true", help="the folder's trained tiny pipeline instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; the real one on CUDA, float32 on a CPU")
    parser.add_argument("--layers", type=float, default=1.0, help="fraction of each kind of block")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of height and of width")
    parser.add_argument("--frames", type=int, help="frames of a video instead of the real number")
    parser.add_argument("--steps", type=int, nargs="+", help="scheduler steps instead of the real numbers")
    parser.add_argument("--computed", type=int, nargs="+", help="computed steps instead of N / 1.5, N / 2, N / 3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    if options.repeats < 1 or options.scale <= 0 or not 0 < options.layers <= 1:
        parser.error("--repeats must be 1 or more, --scale above 0, --layers above 0 and at most 1")
    return options


def main(argv: list[str] | None = None) -> None:
    options = _arguments(argv)
    for name in options.models:
        if options.tiny:
            if not (FOLDERS[name] / "tiny" / "model_index.json").exists():
                print(f"{name}: no tiny pipeline in {FOLDERS[name].name}", file=sys.stderr)
                continue
            device, dtype, suffix = torch.device("cpu"), torch.float32, "tiny"
            record = tiny_rows(name, options)
        else:
            device, model = torch.device(options.device), MODELS[name]
            dtype = getattr(torch, options.dtype) if options.dtype else model.dtype
            dtype = torch.float32 if device.type == "cpu" and not options.dtype else dtype
            request = Request(options.layers, options.scale, options.frames, device, dtype)
            record, suffix = real_rows(model, request, options), device.type
        record["clock"] = clock_of(device)
        write(f"latency_{name}_{suffix}", {**record, **machine(device, dtype)}, options.out)
        gc.collect()


if __name__ == "__main__":
    main()
