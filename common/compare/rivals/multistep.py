"""A second-order multistep solver with fewer steps, on the grid of the pipeline's own scheduler.

The pipeline keeps its first-order scheduler, which makes the grid of K steps, shift and all. Only its `step` is
replaced: by a multistep solver of diffusers on that grid or, for flow matching, by the Adams-Bashforth rule. With
`order` 1 the result is that of the pipeline's own scheduler, which a test checks.

Flow matching comes with two signs: FLUX and Wan predict noise - data, Open-Sora data - noise. The scheduler's own step
shows which.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from compare.rivals.base import NotApplicable, Rival, Run, Setting, replaced
from ertacache.solver import bare_copy, first_output

SOLVERS = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
ADAMS_BASHFORTH = "adams-bashforth"  # for flow matching only
SMALLEST_ALPHA_BAR = 2.0**-24  # stands for zero, as in diffusers, where log(alpha) would be infinite
LARGEST_SIGMA = 1 - 1e-6  # the same for flow matching; diffusers' UniPC clips its own grid so
SIGN_TOLERANCE = 1e-3  # of a step's increment against the difference of its sigmas


class Multistep(Rival):
    """Run K steps of a multistep solver on the scheduler's own grid; `num_steps` is K, each `solver` is tried.

    Args:
        order: of the solvers; 1 is for tests, which compare it with the scheduler that it replaces.
    """

    name = "multistep"
    knob = "num_steps"
    static = True

    def __init__(self, order: int = 2):
        self.order = order
        self.solvers: Sequence[str] = tuple(SOLVERS)

    def prepare(self, pipe: Any, runs: Sequence[Run], num_steps: int) -> None:
        """Calibrate nothing; with flow matching there is one more solver to try."""
        self.solvers = (*SOLVERS, ADAMS_BASHFORTH) if is_flow(pipe.scheduler) else tuple(SOLVERS)

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [[{"num_steps": k, "solver": solver} for k in range(2, num_steps)] for solver in self.solvers]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        scheduler = pipe.scheduler
        solver = make_solver(scheduler, str(setting.get("solver", "dpmsolver++")), self.order)
        set_timesteps = scheduler.set_timesteps
        sign = 1.0  # of the model's output, to what the solver takes

        @functools.wraps(set_timesteps)  # pipelines look at the signature to see which grids it takes
        def starting(*args: Any, **kwargs: Any) -> Any:
            nonlocal sign
            result = set_timesteps(*args, **kwargs)
            sign = velocity_sign(scheduler) if is_flow(scheduler) else 1.0
            put_on_grid(solver, scheduler)
            return result

        @functools.wraps(scheduler.step)  # eta and generator are of stochastic schedulers: not used
        def stepping(
            model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, return_dict: bool = True, **__: Any
        ) -> Any:
            output = model_output if sign > 0 else -model_output
            return solver.step(output, timestep, sample, return_dict=return_dict)

        with replaced(scheduler, "set_timesteps", starting), replaced(scheduler, "step", stepping):
            yield {"num_inference_steps": setting["num_steps"]}


class AdamsBashforth:
    """x' = x + h (v + h / (2 h_) (v - v_)) with h = sigma' - sigma and h_ = that of the last step, v_ its output.

    The linear multistep rule of second order on an uneven grid (Hairer, Norsett and Wanner, Solving Ordinary
    Differential Equations I, III.5); the first step is Euler's, and with order 1 every step.
    """

    def __init__(self, order: int = 2):
        self.order = order
        self.timesteps = self.sigmas = torch.empty(0)
        self.set_begin_index(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Do nothing: the grid is put in place from outside."""

    def set_begin_index(self, index: int) -> None:
        """Begin a run at a step of the grid, with no output before it."""
        self.index = index
        self.last: Tensor | None = None

    def step(self, velocity: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Return the next latents, of the sample's shape and dtype; `timestep` is not read."""
        i = self.index
        increment = float(self.sigmas[i + 1] - self.sigmas[i])
        slope = velocity.float()
        if self.order > 1 and self.last is not None:
            ratio = increment / float(self.sigmas[i] - self.sigmas[i - 1])
            slope = slope + 0.5 * ratio * (slope - self.last)
        self.index, self.last = i + 1, velocity.float()
        return ((sample.float() + increment * slope).to(sample.dtype),)


def make_solver(scheduler: Any, name: str, order: int) -> Any:
    """Make the multistep solver `name` for models that `scheduler` samples.

    Raises:
        NotApplicable: `scheduler` is a multistep solver itself, stochastic, or of an unknown kind.
    """
    config = scheduler.config
    if hasattr(scheduler, "model_outputs") or isinstance(scheduler, CogVideoXDPMScheduler):
        raise NotApplicable(f"{type(scheduler).__name__} is a multistep solver already: see fewer-steps")
    if config.get("stochastic_sampling", False) or config.get("invert_sigmas", False):
        raise NotApplicable(f"{type(scheduler).__name__} samples stochastically or with inverted sigmas")
    if is_flow(scheduler):
        if name == ADAMS_BASHFORTH:
            return AdamsBashforth(order)
        return SOLVERS[name](prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order)
    known = config.get("prediction_type") in ("epsilon", "v_prediction", "sample")
    if known and hasattr(scheduler, "alphas_cumprod") and name in SOLVERS:
        return SOLVERS[name](prediction_type=config.prediction_type, solver_order=order)
    raise NotApplicable(f"no multistep counterpart of {type(scheduler).__name__} is known")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler may step along straight paths: first order, sigmas, no alpha-bars.

    `velocity_sign` makes sure once a run has a grid.
    """
    first_order = getattr(scheduler, "order", None) == 1 and not hasattr(scheduler, "model_outputs")
    return first_order and hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")


def velocity_sign(scheduler: Any) -> float:
    """1 if the scheduler takes noise - data, -1 if data - noise; its grid must be set.

    Its step is x' = x + s (sigma' - sigma) v; a copy steps once, and s is its increment over that difference.

    Raises:
        NotApplicable: the step is another one.
    """
    probe = bare_copy(scheduler)
    probe.set_begin_index(0)
    ones = torch.ones(1, 1, 1, 1)
    increment = float(first_output(probe.step(ones, scheduler.timesteps[0], torch.zeros_like(ones))).float().mean())
    sigmas = scheduler.sigmas.detach().float().cpu()
    sign = increment / float(sigmas[1] - sigmas[0])
    if abs(abs(sign) - 1) > SIGN_TOLERANCE:
        raise NotApplicable(f"{type(scheduler).__name__} does not make Euler steps along its sigmas")
    return 1.0 if sign > 0 else -1.0


def put_on_grid(solver: Any, scheduler: Any) -> None:
    """Put `solver` on the current grid of `scheduler`, with an empty history."""
    solver.set_timesteps(len(scheduler.timesteps))
    sigmas = noise_levels(scheduler)
    if isinstance(solver, UniPCMultistepScheduler) and solver.config.use_flow_sigmas:
        sigmas = sigmas.clamp_max(LARGEST_SIGMA)
    solver.sigmas = sigmas
    solver.timesteps = scheduler.timesteps.clone()
    solver.set_begin_index(0)


def noise_levels(scheduler: Any) -> Tensor:
    """(num_steps + 1,) float32 on the host, the last 0: sigmas of flow matching, else noise / signal
    sqrt((1 - alpha_bar) / alpha_bar), which is what diffusers' solvers call sigma."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return scheduler.sigmas.detach().float().cpu().clone()
    alpha_bar = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.long().cpu()].clamp_min(SMALLEST_ALPHA_BAR)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().float()
    return torch.cat([sigmas, sigmas.new_zeros(1)])
