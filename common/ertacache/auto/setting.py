"""What a calibration belongs to: model and weights, scheduler and grid, branches of guidance, dtype."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ertacache import provenance, solver
from ertacache.attach import transformers_of
from ertacache.calibration import Calibration, computed_steps_for
from ertacache.errors import CalibrationError
from ertacache.intercept import uncompiled

HASH_LENGTH = 16  # hexadecimal digits of a setting's name
TIMESTEP_DIGITS, SIGMA_DIGITS = 1, 4  # within the tolerance of a grid; a run is compared once more when it begins
GOALS = ("speedup", "computed_steps", "min_psnr")
LORA = "lora_"  # in the names of the parameters that an adapter adds


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


@dataclass(frozen=True)
class Setting:
    """One setting, with what a person and a file need to tell it from others.

    Attributes:
        facts: what is hashed.
        num_steps: N.
    """

    facts: dict[str, Any]
    num_steps: int
    key: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(self.facts, sort_keys=True, default=str)
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH])

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and other.key == self.key

    def __str__(self) -> str:
        return f"{self.facts['models'][0]['class']}, {self.num_steps} steps"

    def name(self, goal: Goal) -> str:
        """The name of its calibration's file, without folder."""
        kind = re.sub(r"[^a-z0-9]+", "-", self.facts["models"][0]["class"].lower()).strip("-")
        return f"{kind}-n{self.num_steps}-{goal.label(self.num_steps)}-{self.key}.json"


def setting_of(pipe: Any, scheduler: Any, branches: int, beside: dict[str, Any]) -> Setting:
    """The setting of a run whose grid is set.

    Args:
        branches: samples that the transformer sees for each one of the latents: 2 with classifier-free guidance.
        beside: what else counts, as with `strict`.
    """
    timesteps, sigmas = solver.host_grid(scheduler)
    facts = {
        "models": [
            {
                "class": provenance.class_name(model),
                "config": provenance.config_hash(model),
                "weights": base_fingerprint(model),
                "dtype": provenance.model_dtype(model),
            }
            for model in transformers_of(pipe).values()
        ],
        "scheduler": solver.identity(scheduler),
        "timesteps": [round(t, TIMESTEP_DIGITS) + 0.0 for t in timesteps],
        "sigmas": [round(s, SIGMA_DIGITS) + 0.0 for s in sigmas],
        "branches": branches,
        **beside,
    }
    return Setting(facts, len(timesteps))


def base_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint of a model's weights without adapters that lie beside them: that of the model before."""
    model = uncompiled(model)
    if any(LORA in name for name, _ in model.named_parameters()):
        return provenance.weights_fingerprint(_WithoutAdapters(model))  # type: ignore[arg-type]
    return provenance.weights_fingerprint(model)


def present_weights(model: nn.Module, setting: Setting) -> str | None:
    """The fingerprint of a model's weights with its adapters; not computed again where there are none."""
    if any(LORA in name for name, _ in uncompiled(model).named_parameters()):
        return provenance.weights_fingerprint(model)
    return setting.facts["models"][0]["weights"]


class _WithoutAdapters:
    """What a fingerprint reads of a module, without adapters and under the names of before they were loaded."""

    def __init__(self, model: nn.Module):
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if LORA not in name:
                yield name.replace(".base_layer.", "."), parameter

    def get_submodule(self, path: str) -> nn.Module:
        found = self.model.get_submodule(path)
        return getattr(found, "base_layer", found)


def fits_goal(calibration: Calibration, goal: Goal) -> bool:
    """Whether a calibration was made for a goal."""
    if goal.name == "min_psnr":
        return calibration.settings.get("goal_value") == goal.value
    return len(calibration.computed_steps) == goal.computed_steps(calibration.num_inference_steps)
