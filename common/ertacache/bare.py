"""Attach a calibration to a transformer alone, for sampling loops whose scheduler is out of reach.

The official `wan`, `opensora` and `videosys` code keeps its scheduler in a local variable, so guided outputs are not
to be had. Here each guidance branch has a cache of its own with the same coefficients. With linear guidance that is
exactly the guided prediction: u' + g (c' - u') is the same combination of cached guided outputs.

    with ertacache.apply(model, calibration, converted=True):
        video = wan_t2v.generate(prompt)          # the model is called with (x, t, context, seq_len)

Branches are told apart by what conditions the call, never by counting calls; see branches.py.
"""

import inspect
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ertacache.branches import Branch, FollowedRun
from ertacache.cache import PLAIN
from ertacache.calibration import Calibration
from ertacache.checks import check_latents, check_model, check_no_other_cache, check_weights, warn
from ertacache.errors import MismatchError, StateError
from ertacache.intercept import Interception, check_free, uncompiled
from ertacache.replay import cache_of

# Names that models give to the timestep and to what conditions them (the text), the first one that they have.
TIMESTEP_NAMES = ("t", "timestep", "timesteps")
CONDITION_NAMES = ("context", "encoder_hidden_states", "prompt_embeds", "y")
WRAPPED_NAMES = ("module", "_orig_mod")  # of torch's parallel wrappers and of compiled modules


class ModelCall(NamedTuple):
    """What a cache reads of one call of a model; no output on a reused step."""

    model_output: Tensor
    sample: Tensor


class ModelAttachment:
    """Run a calibration on a model whose calls are all that is seen of the sampling loop.

    Args:
        check_finite: look for NaN and Inf in what the loop gets, once, at the last call of a run.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, check_finite: bool = True):
        self.model, self.calibration, self.check_finite = model, calibration, check_finite
        self.signature = inspect.signature(type(unwrapped(model)).forward)
        names = list(self.signature.parameters)
        self.timestep_name = _first_of(TIMESTEP_NAMES, names, model)
        self.condition_name = _first_of(CONDITION_NAMES, names, model)
        self.input_name = names[1]
        self.computed = frozenset(calibration.computed_steps)
        self.run = FollowedRun(calibration.timesteps)
        self.interception = Interception(model, self.answer, self)
        self.computed_calls = self.reused_calls = 0
        self.handle: Any = None  # what `apply` returned

    def attach(self) -> "ModelAttachment":
        check_free(self.model)
        self.interception.put_on()
        return self

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        self.run.reset()
        self.interception.take_off()

    def answer(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the loop gets instead of the model's output, in the model's own dtype and container."""
        arguments = self.signature.bind(self.model, *args, **kwargs).arguments
        condition, inputs = tensors_of(arguments[self.condition_name]), tensors_of(arguments[self.input_name])
        branch = self.run.place((_key(condition), _shapes(inputs)), condition, arguments[self.timestep_name])
        step = self.run.current_step
        if step == 0:
            self._check_shape(inputs[0])
            branch.caches = [cache_of(self.calibration, own_grid=True).start(x.device) for x in inputs]
        result = self._result(branch, step, inputs, args, kwargs)
        if self.check_finite:
            for tensor in tensors_of(result):
                self.run.finite.see(step, tensor)
        if self.run.is_over():
            self.run.finish(self.computed.__contains__)
        return result

    def _result(self, branch: Branch, step: int, inputs: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        if step not in self.computed:
            self.reused_calls += 1
            return rebuilt(branch.container, [self._combined(branch, i, step, x) for i, x in enumerate(inputs)])
        output = self._computed(args, kwargs)
        tensors = tensors_of(output)
        branch.container, branch.shapes = type(output), [tensor.shape for tensor in tensors]
        made = [
            self._combined(branch, i, step, sample, tensor)
            for i, (sample, tensor) in enumerate(zip(inputs, tensors, strict=True))
        ]
        plain = all(new is old for new, old in zip(made, tensors, strict=True))
        return output if plain else rebuilt(branch.container, made)

    def _combined(self, branch: Branch, index: int, step: int, latents: Tensor, fresh: Tensor | None = None) -> Tensor:
        """What the cache makes of one output; the guided combination of branches then has b x of the latents too.

        Args:
            fresh: the output of this step, where it was computed.
        """
        cache, shape = branch.caches[index], branch.shapes[index]
        kept = None if fresh is None else channels_of(fresh, latents)
        row = cache.rows[step] if cache.rows else None  # none of the published method, which needs the latents
        of_latents = shape == latents.shape or _wider_axis(shape, latents.shape) is not None
        if (row is None or row.latents) and not of_latents:
            raise MismatchError(
                f"the model makes {list(shape)} of latents {list(latents.shape)}, but the calibration combines both: "
                "calibrate again with effort 'balanced' and method 'ertacache'"
            )
        # on a reused step the cache reads no model output
        tensor = cache.output(step, ModelCall(latents if kept is None else kept, latents))
        if fresh is not None and row in (None, PLAIN):
            return fresh
        return widened(tensor, shape, fresh)

    def _computed(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            output = self.interception.run(*args, **kwargs)
        except BaseException:  # an interruption too: this run will not go on
            self.run.reset()
            raise
        self.computed_calls += 1
        return output

    def _check_shape(self, tensor: Tensor) -> None:
        shape, wanted = list(tensor.shape), self.calibration.latent_shape
        check_latents(self.calibration, shape if len(shape) == len(wanted) else shape[1:])


def check_bare_model(calibration: Calibration, model: nn.Module, converted: bool) -> None:
    """Raise MismatchError where the calibration cannot run on a model without its scheduler, or is for another one.

    Args:
        converted: the model holds the calibrated weights in the class of another package, so that neither class nor
            configuration nor a fingerprint of the weights can be compared.
    """
    check_no_other_cache(model)
    if calibration.method == "paper" and (calibration.adjusted_sigmas or calibration.adjusted_timesteps):
        warn(
            "method 'paper' runs without its timestep adjustment here, since the loop's scheduler is out of reach: "
            "residual reuse and error model alone"
        )
    if not converted:
        check_model(calibration, model)
        check_weights(calibration, model)


# -- what a call is made of ------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's wrappers, whose forward names its arguments."""
    if uncompiled(model) is not model:  # its wrapper has no forward of its own in its class
        return unwrapped(uncompiled(model))
    for name in WRAPPED_NAMES:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and "forward" in vars(type(model)):
            names = inspect.signature(type(model).forward).parameters.values()
            if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in names):
                return unwrapped(inner)
    return model


def can_follow(model: nn.Module) -> bool:
    """Whether a model's forward takes a timestep and a condition."""
    names = inspect.signature(type(unwrapped(model)).forward).parameters
    return all(any(name in names for name in wanted) for wanted in (TIMESTEP_NAMES, CONDITION_NAMES))


def _first_of(wanted: Sequence[str], present: Sequence[str], model: nn.Module) -> str:
    for name in wanted:
        if name in present:
            return name
    raise MismatchError(
        f"{type(model).__name__} takes none of the arguments {', '.join(wanted)}, by which ERTACache follows a "
        "transformer without its scheduler"
    )


def channels_of(output: Tensor, sample: Tensor) -> Tensor:
    """The channels of an output that the latents have too, a view; all of it where they differ otherwise.

    Models that predict variances return twice the channels, and no calibration says how to combine those.
    """
    axis = _wider_axis(output.shape, sample.shape)
    return output if axis is None else output.narrow(axis, 0, sample.shape[axis])


def widened(tensor: Tensor, shape: torch.Size, fresh: Tensor | None) -> Tensor:
    """A combination of `channels_of` in the model's own shape: further channels from `fresh`, or zeros."""
    axis = _wider_axis(shape, tensor.shape)
    if axis is None:
        return tensor
    count = tensor.shape[axis]
    rest = [size - count if place == axis else size for place, size in enumerate(shape)]
    further = tensor.new_zeros(rest) if fresh is None else fresh.narrow(axis, count, rest[axis])
    return torch.cat([tensor, further], dim=axis)


def _wider_axis(shape: Sequence[int], other: Sequence[int]) -> int | None:
    """The one axis along which a shape is larger than another one; None where that is not all that differs."""
    differing = [place for place, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]
    only = len(shape) == len(other) and len(differing) == 1 and shape[differing[0]] > other[differing[0]]
    return differing[0] if only else None


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of an argument or an output: itself, those of a list or tuple, or an output object's first."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return list(value)
    try:
        first = value[0]
    except (TypeError, KeyError, IndexError):
        first = None
    if isinstance(first, Tensor) and not isinstance(value, (list, tuple)):
        return [first]
    raise StateError(f"expected a tensor or a list of tensors, got {type(value).__name__}")


def rebuilt(container: Any, tensors: list[Tensor]) -> Any:
    """An output of the type `container` around tensors; the opposite of `tensors_of`."""
    if issubclass(container, Tensor):
        return tensors[0]
    return container(tensors) if issubclass(container, (list, tuple)) else container(tensors[0])


def _key(tensors: list[Tensor]) -> Hashable:
    """Identity of conditioning tensors: place in memory and shape, the same for a new view of the same numbers."""
    return tuple((t.data_ptr() if t.numel() and not t.is_meta else id(t), tuple(t.shape)) for t in tensors)


def _shapes(tensors: list[Tensor]) -> Hashable:
    return tuple(tuple(t.shape) for t in tensors)
