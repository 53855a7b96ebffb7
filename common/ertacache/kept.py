"""The calibrations that a model folder keeps: under which name, when one is made, and when it is used again."""

import sys
from pathlib import Path
from typing import Any

import ertacache
from ertacache import policy, provenance
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.model_folder import ModelFolder, slug
from ertacache.settings import Settings, read_prompts


def computed_steps(settings: Settings) -> int:
    """K of the settings' goal, where it says one."""
    name, value = settings.goal()
    return value if name == "computed_steps" else policy.computed_steps_for(settings.num_inference_steps, value)


def obtain_calibration(pipe: Any, settings: Settings, model: ModelFolder) -> tuple[Calibration, Path]:
    """The calibration for the settings: the named file, the kept one, or a new one, which is then kept."""
    if settings.calibration is not None:
        path = Path(settings.calibration)
        if not path.is_absolute() and "calibration" not in settings.given:
            path = settings.folder / path
        return _checked(Calibration.load(path), settings, path), path
    path = settings.path("calibration_folder") / calibration_name(settings, model)
    if path.exists():
        return _checked(Calibration.load(path), settings, path), path
    print(f"no calibration for this setting yet: making {path.name}", file=sys.stderr)
    prompts = calibration_prompts(settings)
    goal, value = settings.goal()
    made = ertacache.calibrate(
        pipe,
        prompts,
        seeds=range(len(prompts)),
        method=settings.method,
        search_budget=settings.search_budget,
        refine=settings.refine if settings.method == "ertacache" else 0,
        micro_batch=settings.micro_batch,
        memory_limit=settings.memory_limit(),
        **{goal: value},
        **model.arguments(settings),
    )
    made.save(path)
    return made, path


def kept_calibration(pipe: Any, settings: Settings, model: ModelFolder) -> Calibration | None:
    """The kept calibration for the settings; None where there is none, or one of other prompts or other weights."""
    path = settings.path("calibration_folder") / calibration_name(settings, model)
    if not path.exists():
        return None
    calibration = Calibration.load(path)
    prompts = calibration_prompts(settings)
    same_prompts = calibration.prompts.get("sha256") == provenance.prompts_hash(prompts, range(len(prompts)))
    weights = provenance.weights_fingerprint(pipe.transformer)
    return calibration if same_prompts and calibration.model.get("weights_fingerprint") == weights else None


def _checked(calibration: Calibration, settings: Settings, path: Path) -> Calibration:
    if calibration.method != settings.method:
        raise CalibrationError(f"{path} is for method {calibration.method}; use --method {calibration.method} with it")
    return calibration


def calibration_prompts(settings: Settings) -> list[str]:
    """The prompts that the settings calibrate on."""
    return read_prompts(settings.path("calibration_prompts"))[: settings.num_calibration_prompts]


def calibration_name(settings: Settings, model: ModelFolder) -> str:
    """File name of the calibration for a setting: model, size, steps, guidance, noise grid, method and goal."""
    name = "tiny" if settings.model == "tiny" else settings.model.rstrip("/").split("/")[-1]
    goal, value = settings.goal()
    goal_part = f"k{computed_steps(settings)}" if goal in ("speedup", "computed_steps") else f"{goal}{value:g}"
    size = f"{settings.width}x{settings.height}"
    frames = getattr(settings, "num_frames", None)
    if frames:
        size += f"x{frames}"
    parts = [
        slug(name),
        size,
        f"n{settings.num_inference_steps}",
        f"g{settings.guidance_scale:g}",
        *([model.variant(settings)] if model.variant else []),
        settings.method,
        goal_part,
    ]
    if settings.search_budget and settings.method == "ertacache":
        parts.append(f"search{settings.search_budget}")
    if settings.refine and settings.method == "ertacache":
        parts.append(f"refine{settings.refine}")
    return "-".join(parts) + ".json"
