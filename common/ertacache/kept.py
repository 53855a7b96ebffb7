"""The calibrations that a model folder keeps: under which name, when one is made, and when it is used again."""

import glob
import re
import sys
from pathlib import Path
from typing import Any

import ertacache
from ertacache import policy, processes, provenance
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.model_folder import ModelFolder, slug
from ertacache.settings import Settings, read_prompts
from ertacache.timesteps import PHI_OVER

EFFORTS = ("search", "refine", "descent")  # in file names, each with a number


def computed_steps(settings: Settings) -> int:
    """K of the settings' goal, where it says one."""
    name, value = settings.goal()
    return value if name == "computed_steps" else policy.computed_steps_for(settings.num_inference_steps, value)


def phi_over(settings: Settings) -> str:
    """What the published adjustment measures an error by, where the folder's config.py offers it."""
    return getattr(settings, "phi_over", PHI_OVER[0])


def obtain_calibration(pipe: Any, settings: Settings, model: ModelFolder) -> tuple[Calibration, Path]:
    """The calibration for the settings: the named file, the kept one, or a new one, which is then kept."""
    if settings.calibration is not None:
        path = settings.path("calibration")
        return _checked(Calibration.load(path), settings, path), path
    path = settings.path("calibration_folder") / calibration_name(settings, model)
    found = kept_path(settings, model)
    if found is not None:
        return _checked(Calibration.load(found), settings, found), found
    print(f"no calibration for this setting yet: making {path.name}", file=sys.stderr)
    made = new_calibration(pipe, settings, model)
    made.save(path)
    return made, path


def new_calibration(pipe: Any, settings: Settings, model: ModelFolder) -> Calibration:
    """One that is made for the settings, on their calibration prompts."""
    prompts = calibration_prompts(settings)
    search_budget, refine, descent = _effort(settings)
    goal, value = settings.goal()
    return ertacache.calibrate(
        pipe,
        prompts,
        seeds=range(len(prompts)),
        method=settings.method,
        phi_over=phi_over(settings),
        search_budget=search_budget,
        refine=refine,
        descent=descent,
        micro_batch=settings.micro_batch,
        memory_limit=settings.memory_limit(),
        progress=processes.is_main(),
        **{goal: value},
        **model.arguments(settings),
    )


def kept_path(settings: Settings, model: ModelFolder) -> Path | None:
    """The kept file for the settings that most effort went into, no less of any kind than they ask for."""
    folder, asked = settings.path("calibration_folder"), _effort(settings)
    name = _base_name(settings, model)
    efforts = {path: _effort_of(path.stem.removeprefix(name)) for path in folder.glob(f"{glob.escape(name)}*.json")}
    enough = {
        path: effort
        for path, effort in efforts.items()
        if effort and all(spent >= wanted for spent, wanted in zip(effort, asked, strict=True))
    }
    return max(enough, key=lambda path: (enough[path], path)) if enough else None


def kept_calibration(pipe: Any, settings: Settings, model: ModelFolder) -> Calibration | None:
    """The kept calibration for the settings; None where there is none, or one of other prompts or other weights.

    More prompts of the same file are more effort too.
    """
    path = kept_path(settings, model)
    if path is None:
        return None
    calibration = Calibration.load(path)
    prompts, count = calibration_file_prompts(settings), calibration.prompts.get("count")
    if not isinstance(count, int) or not min(settings.num_calibration_prompts, len(prompts)) <= count <= len(prompts):
        return None
    same_prompts = calibration.prompts.get("sha256") == provenance.prompts_hash(prompts[:count], range(count))
    weights = provenance.weights_fingerprint(pipe.transformer)
    return calibration if same_prompts and calibration.model.get("weights_fingerprint") == weights else None


def _checked(calibration: Calibration, settings: Settings, path: Path) -> Calibration:
    if calibration.method != settings.method:
        raise CalibrationError(f"{path} is for method {calibration.method}; use --method {calibration.method} with it")
    return calibration


def calibration_prompts(settings: Settings) -> list[str]:
    """The prompts that the settings calibrate on."""
    return calibration_file_prompts(settings)[: settings.num_calibration_prompts]


def calibration_file_prompts(settings: Settings) -> list[str]:
    """All prompts of their file, the first of which they calibrate on."""
    return read_prompts(settings.path("calibration_prompts"))


def calibration_name(settings: Settings, model: ModelFolder) -> str:
    """File name of a calibration: `_base_name`, and how much of each kind of effort where there is any."""
    parts = [f"-{kind}{count}" for kind, count in zip(EFFORTS, _effort(settings), strict=True) if count]
    return "".join([_base_name(settings, model), *parts, ".json"])


def _effort(settings: Settings) -> tuple[int, ...]:
    """Schedules to try, prompts to refine on, and steps of descent."""
    ours = settings.method == "ertacache"
    return (settings.search_budget, settings.refine, settings.descent) if ours else (0,) * len(EFFORTS)


def _effort_of(suffix: str) -> tuple[int, ...] | None:
    """The effort that the end of a file name tells; None where it tells something else."""
    found = re.fullmatch("".join(rf"(?:-{kind}(\d+))?" for kind in EFFORTS), suffix)
    return tuple(int(count or 0) for count in found.groups()) if found else None


def _base_name(settings: Settings, model: ModelFolder) -> str:
    """What a calibration is for: model, size, steps, guidance, noise grid, method and goal."""
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
        *(["change"] if settings.method == "paper" and phi_over(settings) == "change" else []),
        goal_part,
    ]
    return "-".join(parts)
