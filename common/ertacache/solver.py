"""Facts about a scheduler: the affine map of its step, its noise grid, and what identifies it.

A scheduler step is affine in its model output: x_{i+1} = F_i(x_i, history) + c_i o_i. For Euler
c_i = sigma_{i+1} - sigma_i; for any other deterministic solver F_i and c_i come from two steps of copies.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ertacache.errors import StateError

SAMPLE_NAMES = ("sample", "latents")
OUTPUT_NAMES = ("model_output", "noise_pred")
# where the axis of a scheduler without sigmas ends: one before the first training timestep, the index of the
# empty product, at which alpha-bar is 1
END_TIMESTEP = -1.0
GAIN_SPREAD = 1e-3  # relative, by which c may differ between elements and still be one number
AFFINE_TOLERANCE = 1e-3  # of what a step moves: a step may be that far from F + c o
# of a configuration, that say how it was saved or by what, and change with the packages that load it
SAVED_WITH = (
    *("architectures", "auto_map", "dtype", "model_type", "name_or_path", "quantization_config", "torch_dtype"),
    *("transformers_version", "transformers_weights"),
)
# instance attributes by which attach.py follows a scheduler; a copy must not carry them
FOLLOWED_METHODS = ("step", "set_timesteps")


@dataclass(frozen=True)
class StepSignature:
    """Which arguments of a scheduler's step are its model output and its sample.

    Found once for a scheduler: binding a signature takes longer than the rest of a small scheduler's step.
    """

    output: str
    sample: str
    names: list[str]

    @classmethod
    def of(cls, signature: inspect.Signature) -> "StepSignature":
        """Of `scheduler.step`, without its self; raises StateError where it does not name its arguments."""
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [name for name, parameter in signature.parameters.items() if parameter.kind not in starred]
        if len(names) < 2:
            raise StateError(
                f"scheduler.step takes {signature}, but ERTACache finds the model output and the sample by name: "
                "wrap the step with functools.wraps"
            )
        output = next((n for n in OUTPUT_NAMES if n in names), names[0])
        sample = next((n for n in SAMPLE_NAMES if n in names), names[min(2, len(names) - 1)])
        return cls(output, sample, names)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> "StepCall":
        """A call with these arguments; raises TypeError where the model output or the sample is missing."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for name in (self.output, self.sample):
            if arguments.get(name) is None:
                raise TypeError(f"scheduler.step was called without {name!r}")
        return StepCall(self, arguments)


@dataclass(frozen=True)
class StepCall:
    """One call of `scheduler.step`, with its arguments by name."""

    signature: StepSignature
    arguments: dict[str, Any]

    @property
    def model_output(self) -> Tensor:
        """The model's output after guidance."""
        return self.arguments[self.signature.output]

    @property
    def sample(self) -> Tensor:
        """The latents that the step starts from."""
        return self.arguments[self.signature.sample]

    def with_output(self, model_output: Tensor) -> "StepCall":
        """The same call with another model output."""
        return StepCall(self.signature, {**self.arguments, self.signature.output: model_output})

    def trial(self, model_output: Tensor) -> "StepCall":
        """The same call in float32 with cloned random generators, for a copy of the scheduler.

        A step that takes a generator keeps its sample's dtype, since another dtype draws other noise.
        """
        cloned = {name: _clone_generators(value) for name, value in self.arguments.items()}
        if "generator" not in cloned:
            cloned[self.signature.sample] = self.sample.float()
        return StepCall(self.signature, {**cloned, self.signature.output: model_output})


def _clone_generators(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        clone = torch.Generator(value.device)
        clone.set_state(value.get_state())
        return clone
    if isinstance(value, (list, tuple)):
        return type(value)(_clone_generators(v) for v in value)
    return value


def bare_copy(scheduler: Any) -> Any:
    """Deep copy of a scheduler in its current state, with nothing attached."""
    duplicate = copy.deepcopy(scheduler)
    for name in FOLLOWED_METHODS:
        duplicate.__dict__.pop(name, None)
    return duplicate


def affine_step(scheduler: Any, call: Any) -> tuple[Tensor, Any]:
    """Return F (the sample's shape, float32) and c of the step that `call` is about to make: x' = F + c o.

    c is a float, or a tensor of the sample's shape where it is not the same number for all elements. Both come from
    copies of the scheduler. Random generators are cloned and the global ones put back, so a stochastic solver draws
    the same noise in both copies and in the step itself.
    """
    if not isinstance(call, StepCall):  # several prompts' calls, each with a scheduler of its own
        return call.affine()
    zero = torch.zeros_like(call.sample, dtype=torch.float32)
    at_zero = step_of_copy(scheduler, call.trial(zero))
    at_one = step_of_copy(scheduler, call.trial(torch.ones_like(zero)))
    gain = at_one - at_zero
    mean = gain.double().mean().item()
    eps = torch.finfo(call.sample.dtype if "generator" in call.arguments else torch.float32).eps
    spread = float((gain - mean).abs().max())
    uniform = spread <= GAIN_SPREAD * abs(mean) + 16 * eps * float(at_zero.abs().max())
    return at_zero, mean if uniform or not math.isfinite(spread) else gain


def is_affine(scheduler: Any, call: Any, offset: Tensor, gain: Any) -> bool:
    """Whether the step that `call` is about to make is F + c o, element by element."""
    if not isinstance(call, StepCall):
        return call.is_affine(offset, gain)
    output = call.model_output.float()
    made, moved = step_of_copy(scheduler, call.trial(output)), gain * output
    eps = torch.finfo(call.sample.dtype if "generator" in call.arguments else torch.float32).eps
    allowed = AFFINE_TOLERANCE * float(moved.abs().max()) + 64 * eps * float(made.abs().max())
    error = float((offset + moved - made).abs().max())
    return error <= allowed or not math.isfinite(error)  # what is not finite is named elsewhere


def step_of_copy(scheduler: Any, call: StepCall) -> Tensor:
    """The latents, float32, after a step that a copy of the scheduler makes; global generators are put back."""
    device = call.sample.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        result = bare_copy(scheduler).step(**call.arguments)
    return first_output(result).float()


def first_output(result: Any) -> Tensor:
    """First tensor that a model or scheduler call returns, from a tuple, a dictionary or an output object."""
    return next(iter(result.values())) if type(result) is dict else result[0]


def host_grid(scheduler: Any) -> tuple[list[float], list[float]]:
    """Timesteps (N) and sigmas (N + 1; empty if the scheduler has none) as host numbers.

    Reads device tensors, so it belongs before the sampling loop.
    """
    timesteps = [float(t) for t in torch.as_tensor(scheduler.timesteps).tolist()]
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return timesteps, []
    sigmas = [float(s) for s in torch.as_tensor(sigmas).tolist()]
    return timesteps, sigmas if len(sigmas) == len(timesteps) + 1 else []


def takes_timesteps(scheduler: Any) -> bool:
    """Whether a scheduler runs on any timesteps: alpha-bars, no sigmas, `timesteps` in `set_timesteps`."""
    takes = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    return takes and hasattr(scheduler, "alphas_cumprod") and getattr(scheduler, "sigmas", None) is None


def put_on_timesteps(scheduler: Any, timesteps: Sequence[float]) -> None:
    """Begin the scheduler's run on other timesteps, without the attached `set_timesteps`, which follows runs."""
    device = torch.as_tensor(scheduler.timesteps).device
    type(scheduler).set_timesteps(scheduler, device=device, timesteps=list(timesteps))


def identity(scheduler: Any) -> dict[str, Any]:
    """Class name and configuration of a scheduler, plain JSON values only; infinities as text."""
    config = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in (config_of(scheduler) or {}).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }
    return {"class": type(scheduler).__name__, "config": dict(sorted(config.items()))}


def config_of(part: Any) -> dict[str, Any] | None:
    """The public settings of a model's, scheduler's or pipeline's configuration; None where it has none to read.

    It may be a mapping (diffusers), have a `to_dict` (transformers), be a dataclass, a namespace or any object.
    """
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        found = dict(config)
    elif isinstance(config, type) or not hasattr(config, "__dict__"):
        return None
    else:
        to_dict = getattr(config, "to_dict", None)
        found = dict(to_dict()) if callable(to_dict) else dict(vars(config))
        kind: Any = type(config)
        own = inspect.signature(kind.__init__).parameters  # the rest is the base class's, of its version
        found = {key: value for key, value in found.items() if key in own} or found
    return {key: value for key, value in found.items() if not key.startswith("_") and key not in SAVED_WITH}
