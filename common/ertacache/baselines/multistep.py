"""A second-order multistep solver with fewer steps: diffusers' own, on the grid of the pipeline's scheduler.

The pipeline keeps its first-order scheduler, which makes the grid of K steps as ever, dynamic shift and all;
only its `step` is taken over by the multistep solver, put on that same grid. With `order` 1 the result is
that of the pipeline's own scheduler, which is how the test knows that grid and conventions agree.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from ertacache.baselines.base import NotApplicable, Rival, Setting, replaced

SOLVERS = {"dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
SMALLEST_ALPHA_BAR = 2.0**-24  # stands for zero, as in diffusers, where log(alpha) would be infinite
LARGEST_SIGMA = 1 - 1e-6  # the same for flow matching; diffusers' UniPC clips its own grid so


class Multistep(Rival):
    name = "multistep"
    knob = "num_steps"

    def __init__(self, order: int = 2):
        self.order = order

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [[{"num_steps": k, "solver": solver} for k in range(2, num_steps)] for solver in SOLVERS]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        scheduler = pipe.scheduler
        solver = make_solver(scheduler, str(setting.get("solver", "dpmsolver++")), self.order)
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)  # pipelines look at the signature to see which grids it takes
        def starting(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            put_on_grid(solver, scheduler)
            return result

        @functools.wraps(scheduler.step)  # eta and generator are of stochastic schedulers: not used
        def stepping(
            model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, return_dict: bool = True, **__: Any
        ) -> Any:
            return solver.step(model_output, timestep, sample, return_dict=return_dict)

        with replaced(scheduler, "set_timesteps", starting), replaced(scheduler, "step", stepping):
            yield {"num_inference_steps": setting["num_steps"]}


def make_solver(scheduler: Any, name: str, order: int) -> Any:
    """diffusers' multistep solver `name` for models that `scheduler` samples.

    Raises:
        NotApplicable: `scheduler` is a multistep solver itself, stochastic, or of an unknown kind.
    """
    config = scheduler.config
    if hasattr(scheduler, "model_outputs") or isinstance(scheduler, CogVideoXDPMScheduler):
        raise NotApplicable(f"{type(scheduler).__name__} is a multistep solver already: see fewer-steps")
    if config.get("stochastic_sampling", False) or config.get("invert_sigmas", False):
        raise NotApplicable(f"{type(scheduler).__name__} samples stochastically or with inverted sigmas")
    if config.get("prediction_type") in ("epsilon", "v_prediction", "sample") and hasattr(scheduler, "alphas_cumprod"):
        return SOLVERS[name](prediction_type=config.prediction_type, solver_order=order)
    if "FlowMatchEuler" in type(scheduler).__name__:
        return SOLVERS[name](prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order)
    raise NotApplicable(f"no multistep counterpart of {type(scheduler).__name__} is known")


def put_on_grid(solver: Any, scheduler: Any) -> None:
    """Make `solver` ready for a run on the grid that `scheduler` has now; its history is empty again."""
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
