"""What rivals share: their interface, and what they need to know of a run (step, length, branch)."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ertacache.errors import ERTACacheError

Setting = dict[str, float | int | str]  # the tuned knob and whatever is fixed beside it; goes into results.json


class NotApplicable(ERTACacheError):
    """The rival cannot work on this pipeline; the message says why."""


class Run(Protocol):
    """Runs the pipeline on one calibration prompt and seed."""

    def __call__(self, **overrides: Any) -> Tensor:
        """The result, latents or pixels, of the pipeline called with `overrides` on top of its usual arguments."""


class Rival:
    """A cache that others ship, or a solver.

    Attributes:
        knob: the entry of a setting that sets its cost.
        form: what it is, in a line for the notes of tables.
        static: which steps it computes is known before the run, so prompts may share a batch.
        prompts: how many prompts of the calibration file it is prepared on at most; None for those that ours has.
        optional: left out unless it is asked for by name.
    """

    name = ""
    knob = ""
    form = ""
    static = False
    prompts: int | None = None
    optional = False

    def prepare(self, pipe: Any, runs: Sequence[Run], num_steps: int) -> None:
        """Calibrate on uncached runs of `num_steps` steps; most rivals need not."""

    def settings(self, num_steps: int) -> list[Setting]:
        """Settings to try, from the cheapest run to the most expensive one."""
        raise NotImplementedError

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        """Several such lists, if other parameters matter too; the tuner takes the best."""
        return [self.settings(num_steps)]

    def setting_for(self, wanted_fraction: float, num_steps: int) -> Setting | None:
        """The setting of a cost where that is known without trying; None for rivals that are tuned."""
        return None

    def spent(self, setting: Setting) -> float | None:
        """What its calibration for a setting cost in uncached runs, tuning its knob apart; None if unknown."""
        return 0.0

    def attach(self, pipe: Any, setting: Setting) -> AbstractContextManager[dict[str, Any]]:
        """Run the pipeline with this cache inside a context, and as before after it, exceptions or not.

        Yields:
            Arguments of the pipeline's call to override, such as num_inference_steps.

        Raises:
            NotApplicable: here, or in the first run.
        """
        raise NotImplementedError


def geometric(cheapest: float, dearest: float, count: int = 192) -> list[float]:
    """`count` values of a knob from `cheapest` to `dearest`, each the same factor from the last, 4 digits."""
    return [float(f"{value:.4g}") for value in np.geomspace(cheapest, dearest, count)]


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Set `owner.attribute` to `value` inside a context, on the instance only."""
    before = vars(owner).get(attribute)
    in_instance = attribute in vars(owner)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if in_instance:
            setattr(owner, attribute, before)
        else:
            delattr(owner, attribute)


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name -> value of a call of the module's own forward, whatever wraps it."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The latents of a transformer's call: the first argument of its own forward."""
    return next(value for name, value in bound_arguments(module, args, kwargs).items() if name != "self")


@dataclass
class Clock:
    """Where a run is: host state, no device tensor is read."""

    step: int = 0
    num_steps: int = 0
    branch: str = ""  # cache context ("cond", "uncond", "cond_uncond"), or which tensor conditions the call
    calls: int = 0  # of the transformer in this step, the present one included
    arguments: dict[str, Any] = field(default_factory=dict)  # of the transformer's present call, by name


def _nothing() -> None:
    pass


@contextmanager
def watch(
    pipe: Any, on_start: Callable[[], None] = _nothing, on_call: Callable[[], None] = _nothing
) -> Iterator[Clock]:
    """Follow the pipeline's runs through its scheduler and its transformer's calls.

    A run starts when the timesteps are set, so an interrupted run leaves nothing. `on_start` is called then, `on_call`
    before every call of the transformer.
    """
    clock = Clock()
    scheduler, transformer = pipe.scheduler, pipe.transformer
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    context: list[str] = []

    @functools.wraps(set_timesteps)  # pipelines look at the signature to see which grids it takes
    def starting(*args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(*args, **kwargs)
        clock.step, clock.num_steps, clock.calls = 0, len(scheduler.timesteps), 0
        on_start()
        return result

    @functools.wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        clock.step, clock.calls = clock.step + 1, 0
        return result

    def calling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        clock.calls += 1
        clock.arguments = bound_arguments(module, args, kwargs)
        clock.branch = context[-1] if context else _conditioning(clock.arguments)
        on_call()

    with (
        replaced(scheduler, "set_timesteps", starting),
        replaced(scheduler, "step", stepping),
        _context_names(transformer, context),
    ):
        handle = transformer.register_forward_pre_hook(calling, with_kwargs=True)
        try:
            yield clock
        finally:
            handle.remove()


@contextmanager
def _context_names(transformer: nn.Module, names: list[str]) -> Iterator[None]:
    """Keep the names of the cache contexts that the pipeline has entered, the current one last."""
    enter = getattr(transformer, "cache_context", None)
    if enter is None:
        yield
        return

    @contextmanager
    def entering(name: str, **kwargs: Any) -> Iterator[None]:
        names.append(name)
        try:
            with enter(name, **kwargs):
                yield
        finally:
            names.pop()

    with replaced(transformer, "cache_context", entering):
        yield


def _conditioning(arguments: dict[str, Any]) -> str:
    """Tell the branches of a pipeline without cache contexts apart, by the tensor that conditions the call."""
    states = arguments.get("encoder_hidden_states")
    return f"conditioned-on-{states.data_ptr()}" if isinstance(states, Tensor) else "only"
