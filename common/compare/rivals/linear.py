"""Linear solvers of K evaluations: every next state is a combination of the initial noise and of all outputs so far.

    x_{k+1} = a_k x_0 + sum over j <= k of b_kj o_j,    o_j = model(x_j, t_j)

That is the form of bespoke non-stationary solvers (Shaul et al., arXiv 2403.01329). Each solver whose steps are linear
in state and output has it: Euler's, DDIM, multistep and predictor-corrector methods on any grid. So a classical one is
brought into this form by running it on unit vectors.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from compare.rivals.base import Run, replaced
from compare.rivals.multistep import ADAMS_BASHFORTH, SOLVERS, is_flow, make_solver, put_on_grid, velocity_sign
from compare.rivals.runs import batches, together
from ertacache.solver import StepSignature, bare_copy, first_output

OWN = "own"  # the pipeline's own scheduler


class Steps(Protocol):
    """What a run follows in place of its scheduler's steps."""

    @property
    def times(self) -> Tensor | None:
        """What the model is given, one a step; None for the scheduler's own."""

    def step(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        """The next latents, for the guided output of a step and the latents that it started from."""


@contextmanager
def driven(pipe: Any, begin: Callable[[Any], Steps], gradients: bool = False) -> Iterator[None]:
    """Let the pipeline's runs make other steps than its scheduler's.

    Args:
        begin: makes the steps of a run, for the scheduler with its grid set.
        gradients: keep the graph from the first step on, although pipelines run without one.
    """
    scheduler = pipe.scheduler
    set_timesteps = scheduler.set_timesteps
    steps: list[Steps] = []
    count = 0

    @functools.wraps(set_timesteps)  # pipelines look at the signature to see which grids it takes
    def starting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = set_timesteps(*args, **kwargs)
        if gradients:
            torch.set_grad_enabled(True)  # the decorator of the pipeline's call puts it back
        steps[:], count = [begin(scheduler)], 0
        if steps[0].times is not None:
            scheduler.timesteps = steps[0].times.to(torch.as_tensor(scheduler.timesteps).device)
        return result

    signature = StepSignature.of(inspect.signature(scheduler.step))

    @functools.wraps(scheduler.step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        call = signature.call(args, kwargs)
        latents = steps[0].step(count, call.model_output, call.sample)
        count += 1
        return SchedulerOutput(prev_sample=latents) if call.arguments.get("return_dict", True) else (latents,)

    with (
        _frozen(pipe.transformer) if gradients else nullcontext(),
        replaced(scheduler, "set_timesteps", starting),
        replaced(scheduler, "step", stepping),
    ):
        try:
            yield
        finally:  # a scheduler whose timesteps carry a graph cannot be copied
            scheduler.timesteps = torch.as_tensor(scheduler.timesteps).detach()


@contextmanager
def _frozen(transformer: nn.Module) -> Iterator[None]:
    """Keep no graph for the weights, which are not learned."""
    learned = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@dataclass
class LinearSolver:
    """A linear solver of K evaluations.

    Attributes:
        times: (K,), what the model is given, in units of the scheduler's timesteps.
        noise: (K,), the a_k.
        outputs: (K, K), lower triangular, the b_kj.
    """

    times: Tensor
    noise: Tensor
    outputs: Tensor

    def __len__(self) -> int:
        return len(self.times)

    def to_dict(self) -> dict[str, Any]:
        return {name: value.detach().double().tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LinearSolver":
        return cls(**{name: torch.tensor(values[name], dtype=torch.float32) for name in ("times", "noise", "outputs")})

    @contextmanager
    def played(self, pipe: Any, gradients: bool = False) -> Iterator[dict[str, Any]]:
        """Run the pipeline with this solver; yields what to override in its calls."""
        with driven(pipe, lambda _: LinearSteps(self), gradients):
            yield {"num_inference_steps": len(self)}


class LinearSteps:
    """One run of a linear solver."""

    def __init__(self, solver: LinearSolver):
        self.solver, self.times = solver, solver.times
        self.columns: list[Tensor] = []  # x_0 and the outputs

    def step(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        device = sample.device
        if index == 0:
            self.columns = [sample.float()]
        self.columns.append(output.float())
        row = torch.cat([self.solver.noise[index, None], self.solver.outputs[index, : index + 1]]).to(device)
        return torch.tensordot(row, torch.stack(self.columns), 1).to(sample.dtype)


def linear_form(scheduler: Any, name: str = OWN, places: Sequence[float] | None = None, order: int = 2) -> LinearSolver:
    """A classical solver in the form of a linear one, on the grid of `scheduler`, which is set.

    Args:
        name: one of multistep.SOLVERS, ADAMS_BASHFORTH, or OWN.
        places: of its steps in that grid, 0 for the first; None for the grid as it is.

    Raises:
        NotApplicable: there is no such solver for models that `scheduler` samples.
    """
    trial = bare_copy(scheduler)
    sign = velocity_sign(scheduler) if name != OWN and is_flow(scheduler) else 1.0
    if places is not None:
        keep_steps(trial, places)
    solver = trial
    if name != OWN:
        solver = make_solver(trial, name, order)
        put_on_grid(solver, trial)
    elif hasattr(trial, "set_begin_index"):
        trial.set_begin_index(0)
    count = len(trial.timesteps)
    units = torch.eye(count + 1).view(count + 1, 1, 1, 1, count + 1)  # each a sample of one value a unit
    state, rows = units[0], []
    for index, timestep in enumerate(solver.timesteps):
        state = first_output(solver.step(sign * units[index + 1], timestep, state, return_dict=False))
        rows.append(state.flatten())
    form = torch.stack(rows)
    return LinearSolver(trial.timesteps.float().cpu(), form[:, 0].clone(), form[:, 1:].clone())


def keep_steps(scheduler: Any, places: Sequence[float]) -> None:
    """Put a scheduler on some places of its grid; between two of its steps sigmas and timesteps are interpolated."""
    times = torch.as_tensor(scheduler.timesteps)
    kept = _interpolated(times, places)
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == len(times) + 1:
        scheduler.sigmas = torch.cat([_interpolated(scheduler.sigmas, places), scheduler.sigmas[-1:]])
    scheduler.timesteps = kept if times.is_floating_point() else kept.round().to(times.dtype)
    scheduler.num_inference_steps = len(kept)


def _interpolated(values: Tensor, places: Sequence[float]) -> Tensor:
    at = torch.as_tensor(list(places), dtype=torch.float64, device=values.device)
    below = at.floor().long().clamp(max=len(values) - 1)
    above = (below + 1).clamp(max=len(values) - 1)
    found = torch.lerp(values[below].double(), values[above].double(), at - below)
    return found if values.dtype == torch.float64 else found.float()


def solver_names(scheduler: Any, subset: bool = True) -> list[str]:
    """Solvers that may serve a scheduler: its own where it can, and those of multistep.py.

    Args:
        subset: on some steps of a grid, which a scheduler without sigmas cannot leave out.
    """
    own = [OWN] if hasattr(scheduler, "sigmas") or not subset else []
    if is_flow(scheduler):
        return [*own, ADAMS_BASHFORTH, *SOLVERS]
    return own if hasattr(scheduler, "model_outputs") else [*own, *SOLVERS]


@torch.no_grad()
def trajectory(pipe: Any, runs: Sequence[Run]) -> tuple[list[Tensor], list[Tensor]]:
    """Latents x_0 .. x_N and guided outputs o_0 .. o_{N-1} of uncached runs, (P, ...) each, float32."""
    step = pipe.scheduler.step
    signature = StepSignature.of(inspect.signature(step))
    latents: list[Tensor] = []
    outputs: list[Tensor] = []

    @functools.wraps(step)
    def recording(*args: Any, **kwargs: Any) -> Any:
        call = signature.call(args, kwargs)
        outputs.append(call.model_output.float().clone())
        if len(latents) < len(outputs):
            latents.append(call.sample.float().clone())
        result = step(*args, **kwargs)
        latents.append(first_output(result).float().clone())
        return result

    parts = []
    with replaced(pipe.scheduler, "step", recording):
        for rows in batches(runs):
            latents, outputs = [], []
            together(runs[rows])
            parts.append((latents, outputs))
    return tuple([torch.cat(same) for same in zip(*kind, strict=True)] for kind in zip(*parts, strict=True))  # type: ignore[return-value]


class _GridSet(Exception):
    """Ends a run once its grid is set."""


def on_grid(pipe: Any, run: Run, count: int) -> Any:
    """A copy of the pipeline's scheduler on the grid that a run of `count` steps has; nothing is computed."""
    found = []

    def begin(scheduler: Any) -> Steps:
        found.append(bare_copy(scheduler))
        raise _GridSet

    with suppress(_GridSet), driven(pipe, begin), torch.no_grad():
        run(num_inference_steps=count)
    return found[0]


def warped(num_steps: int, count: int, power: float) -> list[float]:
    """Places of `count` steps in a grid of N: N (i / K)^power, more of them early for a power above 1."""
    return [num_steps * (index / count) ** power for index in range(count)]
