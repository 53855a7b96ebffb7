"""Find the kept calibration that fits a run, or make a new one.

What a file holds decides; its name is for people.
"""

import sys
from pathlib import Path
from typing import Any

from ertacache import provenance, solver
from ertacache.calibration import Calibration, computed_steps_for
from ertacache.cli.folder import ModelFolder, slug
from ertacache.cli.settings import Settings, read_prompts
from ertacache.errors import CalibrationError
from ertacache.published import PHI_OVER

EFFORTS = {"fast": 0, "balanced": 1, "best": 2}
# of a calibration's settings: what was asked for, and not an argument of the pipeline; older files have the last ones
ASKED = ("goal", "goal_value", "effort", "phi_over", "setting", "fitted_psnr", "search_budget", "refine", "descent")


def computed_steps(settings: Settings) -> int:
    """K of the settings' goal, if it names one."""
    name, value = settings.goal()
    return value if name == "computed_steps" else computed_steps_for(settings.num_inference_steps, value)


def phi_over(settings: Settings) -> str:
    """`phi_over` of the settings, or its default."""
    return getattr(settings, "phi_over", PHI_OVER[0])


def obtain_calibration(
    pipe: Any, settings: Settings, model: ModelFolder, progress: bool = True
) -> tuple[Calibration, Path]:
    """Return the calibration for the settings: the named file, a kept one, or a new one, which is then kept."""
    if settings.calibration is not None:
        path = settings.path("calibration")
        calibration = Calibration.load(path)
        if calibration.method != settings.method:
            raise CalibrationError(
                f"{path} is for method {calibration.method}; use --method {calibration.method} with it"
            )
        return calibration, path
    found = kept_path(pipe, settings, model)
    if found is not None:
        return Calibration.load(found), found
    path = _free(settings.path("calibration_folder") / calibration_name(settings, model))
    print(f"no calibration for this setting yet: making {path.name}", file=sys.stderr)
    made = new_calibration(pipe, settings, model, progress)
    made.save(path)
    return made, path


def new_calibration(pipe: Any, settings: Settings, model: ModelFolder, progress: bool = True) -> Calibration:
    """Calibrate for the settings, on their calibration prompts."""
    from ertacache.fit.recipe import calibrate  # not needed to generate from a file that is there

    prompts = calibration_prompts(settings)
    goal, value = settings.goal()
    return calibrate(
        pipe,
        prompts,
        seeds=range(len(prompts)),
        method=settings.method,
        effort=settings.effort,
        phi_over=phi_over(settings),
        micro_batch=settings.micro_batch,
        memory_limit=settings.memory_limit(),
        progress=progress,
        **{goal: value},
        **model.arguments(settings),
    )


def kept_path(pipe: Any, settings: Settings, model: ModelFolder, exact: bool = False) -> Path | None:
    """Find the kept file that fits the settings and took most effort; None if there is none.

    Args:
        exact: of just the asked effort.
    """
    fitting: dict[Path, int] = {}
    for path in sorted(settings.path("calibration_folder").glob("*.json")):
        try:
            calibration = Calibration.load(path)
        except CalibrationError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        effort = _effort(calibration.settings)
        if fits(calibration, pipe, settings, model) and not (exact and effort > EFFORTS[settings.effort]):
            fitting[path] = effort
    return max(fitting, key=lambda path: (fitting[path], path)) if fitting else None


def fits(calibration: Calibration, pipe: Any, settings: Settings, model: ModelFolder) -> bool:
    """Whether a calibration is for this model, scheduler, call and goal, at no less effort than asked."""
    given = model.arguments(settings).items()
    arguments = {name: v for name, x in given if isinstance(v := provenance.as_plain(name, x), provenance.PLAIN)}
    beside = {k: v for k, v in calibration.settings.items() if k not in ASKED}
    return (
        calibration.method == settings.method
        and _same_goal(calibration, settings)
        and beside == arguments
        and calibration.scheduler == solver.identity(pipe.scheduler)
        and calibration.dtype == provenance.model_dtype(pipe.transformer)
        and _same_model(calibration.model, pipe.transformer)
        and (settings.method != "paper" or calibration.settings.get("phi_over", PHI_OVER[0]) == phi_over(settings))
        and (settings.method != "ertacache" or _effort(calibration.settings) >= EFFORTS[settings.effort])
    )


def _same_goal(calibration: Calibration, settings: Settings) -> bool:
    goal, value = settings.goal()
    asked = calibration.settings.get("goal"), calibration.settings.get("goal_value")
    if goal in ("speedup", "computed_steps"):
        count = asked[1] if asked[0] == "computed_steps" else len(calibration.computed_steps)
        return asked[0] in ("computed_steps", None) and count == computed_steps(settings)
    return asked == (goal, value)


def _same_model(known: dict[str, Any], transformer: Any) -> bool:
    present = provenance.model_identity(transformer)
    keys = ("class", "config_sha256", "weights_fingerprint")
    return all(known.get(key) is None or known[key] == present[key] for key in keys)


def _effort(settings: dict[str, Any]) -> int:
    """Rank of a calibration's effort; older files were fitted end to end (best) or not (fast)."""
    return EFFORTS.get(settings.get("effort", "best" if settings.get("refine") else "fast"), 0)


def _free(path: Path) -> Path:
    """The path, with a number if another calibration has that name."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def calibration_prompts(settings: Settings) -> list[str]:
    """Calibration prompts of the settings."""
    return calibration_file_prompts(settings)[: settings.num_calibration_prompts]


def calibration_file_prompts(settings: Settings) -> list[str]:
    """All prompts of the settings' calibration file."""
    return read_prompts(settings.path("calibration_prompts"))


def calibration_name(settings: Settings, model: ModelFolder) -> str:
    """A file name that tells a person what a calibration is for."""
    name = "tiny" if settings.model == "tiny" else settings.model.rstrip("/").split("/")[-1]
    goal, value = settings.goal()
    frames = getattr(settings, "num_frames", None)
    parts = [
        slug(name),
        f"{settings.width}x{settings.height}" + (f"x{frames}" if frames else ""),
        f"n{settings.num_inference_steps}",
        f"g{settings.guidance_scale:g}",
        *([model.variant(settings)] if model.variant else []),
        settings.method,
        *(["change"] if settings.method == "paper" and phi_over(settings) == "change" else []),
        f"k{computed_steps(settings)}" if goal in ("speedup", "computed_steps") else f"{goal}{value:g}",
    ]
    if settings.method == "ertacache" and settings.effort != "balanced":
        parts.append(settings.effort)
    return "-".join(parts) + ".json"
