"""Run `run.sh` of a model folder: calibrate if needed, generate with the cache, save, report."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ertacache import provenance
from ertacache.api import apply
from ertacache.calibration import Calibration, to_json
from ertacache.cli import timing
from ertacache.cli.folder import ModelFolder, slug
from ertacache.cli.kept import obtain_calibration
from ertacache.cli.settings import Settings, parse, prompts_of
from ertacache.errors import UsageError
from ertacache.files import write_atomically

RIVAL = "compare.teacache_method"  # runs --method teacache; part of the repository, not of the library
COMPARE_FLAG = (
    "--compare",
    {"action": "store_true", "default": False, "help": "also make the uncached results and measure against them"},
)


def main(folder: Path, load: Callable[[Settings], Any], model: ModelFolder, argv: Sequence[str] | None = None) -> Path:
    """Generate as config files and command line say; return the output folder."""
    chosen = parse(folder, argv, f"Generate with {model.name} and ERTACache.", [COMPARE_FLAG])
    prompts_of(chosen)  # a missing prompt file is said before a model loads
    return generate(load(chosen), chosen, model)


def generate(pipe: Any, settings: Settings, model: ModelFolder) -> Path:
    """Generate every prompt of `settings`, save the results and run.json, and return the output folder."""
    prompts = prompts_of(settings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    arguments = model.arguments(settings)
    calibration, path = None, None
    if settings.method in ("ertacache", "paper"):
        calibration, path = obtain_calibration(pipe, settings, model)
        print(calibration.summary(), file=sys.stderr)
    with method_attached(pipe, settings, model, calibration) as attached:
        pictures, seconds = _sample(pipe, prompts, settings.seed, arguments)
        if settings.method == "auto":
            print(attached.status(), file=sys.stderr)
            status = attached.status()[0]
            calibration = status.calibration if status.accelerated else None
    references = _sample(pipe, prompts, settings.seed, arguments)[0] if settings.compare else None
    files = [
        model.save(picture, out / f"{i:03d}-{slug(prompt)}", settings)
        for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True))
    ]
    record = _record(settings, arguments, prompts, files, seconds, calibration, path)
    if references is not None:
        record["compare"] = _compare(pictures, references)
    write_atomically(out / "run.json", to_json(record))
    _report(settings, record, calibration, out)
    return out


def _sample(pipe: Any, prompts: list[str], seed: int, arguments: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    """Sample every prompt: pixels (3, H, W) or (F, 3, H, W) in [0, 1], and seconds of each denoising loop."""
    pictures = []
    with timing.DenoiseTimer(pipe) as timer:
        for prompt in prompts:
            generator = torch.Generator("cpu").manual_seed(seed)
            result = pipe(prompt=prompt, generator=generator, output_type="pt", **arguments)
            pictures.append(torch.as_tensor(result[0][0]).float().cpu())
    return pictures, timer.seconds


def method_attached(
    pipe: Any, settings: Settings, model: ModelFolder, calibration: Calibration | None
) -> AbstractContextManager[Any]:
    """Attach the method of `settings` inside a context."""
    if calibration is not None:
        return apply(pipe, calibration)
    if settings.method == "auto":
        return _enabled(pipe, settings)
    return _teacache(pipe, settings, model) if settings.method == "teacache" else nullcontext()


def _enabled(pipe: Any, settings: Settings) -> Any:
    from ertacache.auto.handle import MEMORY_LIMIT, enable  # loads the fit

    (goal, value), limit = settings.goal(), settings.memory_limit()
    return enable(
        pipe,
        effort=settings.effort if "effort" in settings.given else "fast",
        memory_limit=MEMORY_LIMIT if limit is None else limit,
        store=settings.path("calibration_folder"),
        **{goal: value},
    )


def _teacache(pipe: Any, settings: Settings, model: ModelFolder) -> Any:
    try:
        rival = importlib.import_module(RIVAL)
    except ImportError as error:
        raise UsageError(f"--method teacache needs the repository's comparison code: {error}") from error
    return rival.attached(pipe, settings, model)


# -- what is written -------------------------------------------------------------------------------------


def _record(
    settings: Settings,
    arguments: dict[str, Any],
    prompts: list[str],
    files: list[Path],
    seconds: list[float],
    calibration: Calibration | None,
    path: Path | None,
) -> dict[str, Any]:
    return {
        "model": settings.model,
        "method": settings.method,
        "prompts": prompts,
        "seeds": [settings.seed] * len(prompts),
        "files": [file.name for file in files],
        "num_inference_steps": settings.num_inference_steps,
        "arguments": {k: v for k, v in arguments.items() if isinstance(v, (int, float, str, type(None)))},
        "computed_steps": calibration.computed_steps if calibration else None,
        "denoise_seconds": sum(seconds),
        "seconds_per_prompt": seconds,
        "peak_memory_bytes": timing.peak_memory_bytes(),
        "calibration": path.name if path else None,
        "calibration_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path else None,
        "predicted": calibration.predicted if calibration else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": settings.dtype,
        "versions": provenance.package_versions(),
    }


def _compare(results: list[Tensor], references: list[Tensor]) -> dict[str, Any]:
    """Measure results, (3, H, W) or (F, 3, H, W), against the uncached ones: one number each per metric."""
    from ertacache.metrics import psnr, ssim, temporal_error

    named: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if results[0].ndim == 4 and len(results[0]) > 1:
        named["temporal_error"] = temporal_error
    return {
        name: [float(metric(made[None], reference[None])) for made, reference in zip(results, references, strict=True)]
        for name, metric in named.items()
    }


def _report(settings: Settings, record: dict[str, Any], calibration: Calibration | None, out: Path) -> None:
    count = len(record["prompts"])
    print(f"{count} result{'s' * (count != 1)} in {out}, {record['denoise_seconds'] / count:.2f} s of denoising each")
    if calibration:
        total, computed = settings.num_inference_steps, len(calibration.computed_steps)
        print(f"transformer steps: {computed} of {total} computed, {total - computed} reused")
    if "compare" in record:
        psnrs, ssims = record["compare"]["psnr"], record["compare"]["ssim"]
        line = f"measured against the uncached results: PSNR {sum(psnrs) / count:.2f} dB, SSIM {sum(ssims) / count:.4f}"
        if "temporal_error" in record["compare"]:
            line += f", temporal error {sum(record['compare']['temporal_error']) / count:.4f}"
        print(line)
    elif calibration and calibration.predicted:
        print(f"predicted: {calibration.quality()}; --compare measures it")
