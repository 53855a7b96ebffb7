"""What a calibration belongs to: model and weights, scheduler and grid, branches of guidance, dtype."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from ertacache import provenance, solver
from ertacache.attach import networks_of
from ertacache.calibration import Calibration, computed_steps_for, to_json
from ertacache.errors import CalibrationError

HASH_LENGTH = 16  # hexadecimal digits of a setting's name
TIMESTEP_DIGITS, SIGMA_DIGITS = 1, 4  # within the tolerance of a grid; a run is compared once more when it begins
KEY = "setting"  # in the settings of a calibration: the hash of what it was made at
GOALS = ("speedup", "computed_steps", "min_psnr")


@dataclass(frozen=True)
class Goal:
    """What is asked for: ("speedup", 2.0), ("computed_steps", 14) or ("min_psnr", 40.0)."""

    name: str
    value: float

    @classmethod
    def of(cls, **asked: float | None) -> "Goal":
        """The one that is given; twice as fast for none. Raises CalibrationError for several, or an impossible one."""
        given = [(name, value) for name, value in asked.items() if value is not None] or [("speedup", 2.0)]
        if len(given) > 1:
            raise CalibrationError(f"give one of {', '.join(GOALS)}; got {', '.join(name for name, _ in given)}")
        (name, value), lowest = given[0], 0 if given[0][0] == "min_psnr" else 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value < float("inf"):
            raise CalibrationError(f"{name} is {value!r}: it must be a number from {lowest}")
        if name == "computed_steps" and value != int(value):
            raise CalibrationError(f"computed_steps is {value!r}: it must be a whole number")
        return cls(name, int(value) if name == "computed_steps" else float(value))

    def asked(self) -> tuple[str, Any]:
        """As the fit takes it."""
        return self.name, self.value

    def computed_steps(self, num_steps: int) -> int | None:
        """K of N steps; None where the fit decides."""
        if self.name == "min_psnr":
            return None
        return computed_steps_for(num_steps, self.value) if self.name == "speedup" else min(int(self.value), num_steps)

    def label(self, num_steps: int) -> str:
        """What tells a setting's calibrations apart: k14, or psnr40."""
        computed = self.computed_steps(num_steps)
        return f"psnr{self.value:g}" if computed is None else f"k{computed}"


@dataclass(frozen=True, eq=False)
class Setting:
    """One setting, with what a person and a file need to tell it from others.

    Attributes:
        facts: what is hashed: `facts_of`, branches (samples that the transformer sees for each one of the latents, 2
            with classifier-free guidance), and what else counts, as with `strict`.
        shown: what else a person is told.
    """

    facts: dict[str, Any]
    shown: str = ""
    key: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(self.facts, sort_keys=True, default=str)
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH])

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.facts["timesteps"])

    def __str__(self) -> str:
        return f"{self.facts['models']['transformer']['class']}, {self.num_steps} steps{self.shown}"

    def name(self, goal: Goal) -> str:
        """The name of its calibration's file, without folder."""
        kind = self.facts["models"]["transformer"]["class"]
        return _file_name(kind, self.num_steps, goal.label(self.num_steps), self.key)


def facts_of(pipe: Any, scheduler: Any) -> dict[str, Any]:
    """The facts of a run that is about to begin: of its pipeline, models and scheduler.

    Reads from the device, so it belongs before the sampling loop.
    """
    return {
        "pipeline": provenance.pipeline_facts(pipe),
        "models": {
            name: {
                "class": provenance.class_name(model),
                "config": provenance.config_hash(model),
                "weights": provenance.weights_fingerprint(model, adapters=False),
                "dtype": provenance.model_dtype(model),
            }
            for name, model in networks_of(pipe).items()
        },
        "scheduler": solver.identity(scheduler),
    }


def facts_and_weights(pipe: Any, scheduler: Any) -> tuple[dict[str, Any], str | None]:
    """The facts of a run, and the fingerprint of the weights with their adapters."""
    found, model = facts_of(pipe, scheduler), pipe.transformer
    adapted = provenance.adapted_layers(model)  # a fingerprint takes a moment
    return found, provenance.weights_fingerprint(model) if adapted else found["models"]["transformer"]["weights"]


def grid_facts(timesteps: list[float], sigmas: list[float]) -> dict[str, Any]:
    """The facts of a run's grid, from its first step on."""
    return {
        "timesteps": [round(t, TIMESTEP_DIGITS) + 0.0 for t in timesteps],
        "sigmas": [round(s, SIGMA_DIGITS) + 0.0 for s in sigmas],
    }


def stored_name(calibration: Calibration) -> str:
    """The name in a store of a calibration that may come from anywhere: by its setting, or by what it holds."""
    kind, n, asked = calibration.model["class"], calibration.num_inference_steps, calibration.settings
    label = f"k{len(calibration.computed_steps)}"
    if asked.get("goal") == "min_psnr" and isinstance(asked.get("goal_value"), (int, float)):
        label = Goal("min_psnr", asked["goal_value"]).label(n)
    key = asked.get(KEY)
    if not isinstance(key, str) or not re.fullmatch(rf"[0-9a-f]{{{HASH_LENGTH}}}", key):
        key = hashlib.sha256(to_json(calibration.to_dict()).encode()).hexdigest()[:8]
    return _file_name(kind, n, label, key)


def _file_name(kind: str, num_steps: int, label: str, key: str) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')[:60]}-n{num_steps}-{label}-{key}.json"


def fits(calibration: Calibration, setting: Setting, goal: Goal, pipe: Any) -> bool:
    """Whether a calibration was made for a setting and a goal; one that `calibrate` made is compared field by field."""
    if calibration.method != "ertacache" or not _fits_goal(calibration, goal):
        return False
    if KEY in calibration.settings:
        return calibration.settings[KEY] == setting.key
    facts, found, models = setting.facts, calibration.pipeline or {}, dict(setting.facts["models"])
    held = {"transformer": calibration.model, **found.get("networks", {})}
    return (
        held.keys() == models.keys()
        and all(_same_model(held[name], model) for name, model in models.items())
        and calibration.dtype == models["transformer"]["dtype"]
        and calibration.scheduler == facts["scheduler"]
        and all(found.get(name, value) == value for name, value in facts["pipeline"].items())
        and found.get("branches", [facts["branches"]])[:1] == [facts["branches"]]
        and calibration.guidance_scale == getattr(pipe, "guidance_scale", None)
        and _same_numbers(calibration.timesteps, facts["timesteps"], TIMESTEP_DIGITS)
        and _same_numbers(calibration.sigmas, facts["sigmas"], SIGMA_DIGITS)
    )


def _same_model(held: dict[str, Any], model: dict[str, Any]) -> bool:
    wanted = {"class": model["class"], "config_sha256": model["config"], "weights_fingerprint": model["weights"]}
    return all(held.get(name) == value for name, value in wanted.items())


def _same_numbers(values: list[float], rounded: list[float], digits: int) -> bool:
    return len(values) == len(rounded) and all(abs(a - b) < 10**-digits for a, b in zip(values, rounded, strict=True))


def _fits_goal(calibration: Calibration, goal: Goal) -> bool:
    if goal.name == "min_psnr":
        asked = calibration.settings
        return asked.get("goal") == "min_psnr" and asked.get("goal_value") == goal.value
    return len(calibration.computed_steps) == goal.computed_steps(calibration.num_inference_steps)
