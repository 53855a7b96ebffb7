"""Loops of other packages as pipelines that can be calibrated: transformer, scheduler, and a call.

    loop = wan(wan_t2v)                                    # WanT2V of the official package
    calibration = ertacache.calibrate(loop, prompts, seeds=range(8), speedup=2.0, size=(832, 480), sampling_steps=50)

`WanLoop` is for one that makes its scheduler inside: while it runs, what it makes it with gives it the adapter's own.
`EulerLoop` is for those that have no scheduler to step.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ertacache.bare import TIMESTEP_NAMES, unwrapped
from ertacache.errors import StateError

WAN_SCHEDULERS = {"unipc": "FlowUniPCMultistepScheduler", "dpm++": "FlowDPMSolverMultistepScheduler"}


class StandIn:
    """Take the place of one attribute in the threads that ask for it; all others get what was there."""

    lock = threading.Lock()
    present: dict[tuple[int, str], "StandIn"] = {}  # noqa: RUF012 - of all threads

    def __init__(self, owner: Any, name: str):
        self.owner, self.name, self.users = owner, name, 0
        self.original, self.own = getattr(owner, name), name in vars(owner)
        self.local = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.local, "answer", self.original)(*args, **kwargs)

    @classmethod
    @contextmanager
    def answering(cls, owner: Any, name: str, answer: Callable[..., Any]) -> Iterator[None]:
        """Answer this thread's calls of `owner.name` for the length of a block."""
        with cls.lock:
            made = cls.present.setdefault((id(owner), name), cls(owner, name))
            made.users += 1
            setattr(owner, name, made)
        made.local.answer = answer
        try:
            yield
        finally:
            del made.local.answer
            with cls.lock:
                made.users -= 1
                if not made.users:
                    del cls.present[id(owner), name]
                    if made.own:
                        setattr(owner, name, made.original)
                    else:
                        delattr(owner, name)


class WanLoop:
    """The loop of `WanT2V.generate`, one prompt at a time.

    Attributes:
        transformer: the model that it calls.
        scheduler: the one that it gets, of the solver that it asks for.
    """

    def __init__(self, package: Any, solver: str = "unipc"):
        self.package, self.solver = package, solver
        self.module: Any = sys.modules[type(package).__module__]
        kind = getattr(self.module, WAN_SCHEDULERS[solver])
        steps = package.num_train_timesteps
        self.scheduler = kind(num_train_timesteps=steps, shift=1, use_dynamic_shifting=False)
        self.transformer: nn.Module = package.model

    def __call__(
        self, prompt: Any, generator: Any = None, output_type: str = "pt", **arguments: Any
    ) -> tuple[Tensor, ...]:
        """Generate one video, (1, frames, 3, height, width) in [0, 1], or its latents.

        Args:
            prompt, generator: one, or a list of one; the generator's seed is what the package gets.
            output_type: "pt", or "latent" to leave the VAE out.
            arguments: of `WanT2V.generate`: size, frame_num, sampling_steps, shift, guide_scale, n_prompt, ...
        """
        (text,) = [prompt] if isinstance(prompt, str) else prompt  # the package takes one: several raise
        (noise,) = generator if isinstance(generator, list) else [generator]
        seed = noise.initial_seed() if isinstance(noise, torch.Generator) else -1
        with ExitStack() as stack:

            def stand_in(owner: Any, name: str, answer: Callable[..., Any]) -> None:
                stack.enter_context(StandIn.answering(owner, name, answer))

            stand_in(self.module, WAN_SCHEDULERS[self.solver], self._scheduler)
            stand_in(self.module, "tqdm", lambda steps, *_, **__: steps)
            if output_type == "latent":
                stand_in(self.package.vae, "decode", lambda latents: latents)
            made = self.package.generate(text, seed=seed, sample_solver=self.solver, **arguments)
        return (made[None] if output_type == "latent" else (made.transpose(0, 1)[None].float() / 2 + 0.5).clamp(0, 1),)

    def _scheduler(self, **settings: Any) -> Any:
        config = self.scheduler.config
        other = {name: value for name, value in settings.items() if config[name] != value}
        if other:
            raise StateError(f"the package makes its scheduler with {other}, which ERTACache does not know yet")
        return self.scheduler


def wan(package: Any, solver: str = "unipc") -> WanLoop:
    """`WanT2V` of the official `wan` package as a pipeline, to calibrate or apply to.

    Args:
        package: the WanT2V.
        solver: "unipc" or "dpm++", the `sample_solver` of `generate`.
    """
    if solver not in WAN_SCHEDULERS:
        raise StateError(f"solver is {solver!r}: it must be one of {', '.join(WAN_SCHEDULERS)}")
    return WanLoop(package, solver)


class EulerScheduler:
    """The Euler steps that a loop makes itself: x' = x + c_i o."""

    def set_timesteps(self, timesteps: Tensor, rate: float) -> None:
        """Begin a run.

        Args:
            timesteps: (N,), falling towards 0.
            rate: what the latents move by in one unit of time, for an output of 1.
        """
        self.timesteps, self.index = timesteps, 0
        self.gains = [rate * t for t in (timesteps - torch.cat([timesteps[1:], timesteps.new_zeros(1)])).tolist()]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor]:
        """Keep the output that the cache gives, for the loop to make its step with."""
        self.taken, gain = model_output, self.gains[self.index]
        self.index += 1
        return (sample + gain * model_output,)


class EulerLoop:
    """A loop that makes its Euler steps inside, as Open-Sora's `scheduler.sample` and flux' `denoise`, as a pipeline.

    Args:
        transformer: the model that the loop calls.
        sample: `sample(model, prompt, seed, **arguments)` runs the loop with the `model` that it is given, and
            returns latents (1, ...).
        decode: from these to pixels (1, ...) in [0, 1].
        guidance_scale: where the loop calls the model with a batch of two halves, first the conditional one, and puts
            the first half of its channels together; None for a loop that takes outputs as they are.
    """

    def __init__(
        self,
        transformer: nn.Module,
        sample: Callable[..., Tensor],
        decode: Callable[[Tensor], Tensor],
        guidance_scale: float | None = None,
    ):
        self.transformer, self.sample, self.decode = transformer, sample, decode
        self.scheduler, self.guidance_scale = EulerScheduler(), guidance_scale
        self.grids: dict[str, tuple[Tensor, float]] = {}  # by arguments

    def __call__(
        self, prompt: Any, generator: Any = None, output_type: str = "pt", **arguments: Any
    ) -> tuple[Tensor, ...]:
        """Run the loop for one prompt, or a list of one, with the generator's seed."""
        (text,) = [prompt] if isinstance(prompt, str) else prompt
        (noise,) = generator if isinstance(generator, list) else [generator]
        seed = noise.initial_seed() if isinstance(noise, torch.Generator) else 0
        key = repr(sorted(arguments.items()))
        if key not in self.grids:
            trial = _Trial(self)
            self.sample(trial, text, seed, **arguments)
            self.grids[key] = trial.grid()
        self.scheduler.set_timesteps(*self.grids[key])
        latents = self.sample(_Stepping(self), text, seed, **arguments)
        return (latents if output_type == "latent" else self.decode(latents),)

    def guided(self, output: Tensor) -> Tensor:
        """The loop's own prediction from an output of the model."""
        if self.guidance_scale is None:
            return output
        with_text, without = output.chunk(2, dim=1)[0].chunk(2, dim=0)
        return without + self.guidance_scale * (with_text - without)

    def unguided(self, prediction: Tensor) -> Tensor:
        """An output from which the loop makes just this prediction: both halves are it."""
        if self.guidance_scale is None:
            return prediction
        halves = torch.cat([prediction, prediction])
        return torch.cat([halves, torch.zeros_like(halves)], dim=1)


class _Standing:
    """What a loop gets for its model: calls of one's own, and the model's attributes."""

    def __init__(self, loop: EulerLoop):
        self.loop, self.signature = loop, inspect.signature(type(unwrapped(loop.transformer)).forward)
        names = list(self.signature.parameters)
        self.input_name, self.timestep_name = names[1], next(name for name in TIMESTEP_NAMES if name in names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop.transformer, name)

    def read(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The latents of one branch, and the timestep."""
        arguments = self.signature.bind(self.loop.transformer, *args, **kwargs).arguments
        latents = arguments[self.input_name]
        half = latents if self.loop.guidance_scale is None else latents.chunk(2)[0]
        return half, torch.as_tensor(arguments[self.timestep_name]).reshape(-1)[0]


class _Trial(_Standing):
    """Answers ones, to find out a loop's timesteps and how far they move the latents; calls no model."""

    def __init__(self, loop: EulerLoop):
        super().__init__(loop)
        self.timesteps: list[Tensor] = []
        self.means: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        latents, timestep = self.read(args, kwargs)
        self.timesteps.append(timestep)
        self.means.append(latents.double().mean().item())
        return self.loop.unguided(torch.ones_like(latents))

    def grid(self) -> tuple[Tensor, float]:
        """Timesteps (N,), and the rate of `EulerScheduler.set_timesteps`; raises StateError for other solvers."""
        times = torch.stack(self.timesteps)
        moved = torch.tensor(self.means).diff() / (times[:-1] - times[1:]).cpu().double()
        rate = 1.0 if float(times[0]) <= 1 else 1e-3
        sign = 1.0 if float(moved.sum()) > 0 else -1.0
        if len(times) < 2 or not torch.allclose(moved, torch.full_like(moved, sign * rate), rtol=0.05, atol=0):
            raise StateError(
                "the loop does not make Euler steps from its timesteps to 0: ERTACache cannot calibrate it"
            )
        return times, sign * rate


class _Stepping(_Standing):
    """Calls the model, and has the attached scheduler make of its output what the loop goes on with."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        latents, _ = self.read(args, kwargs)
        scheduler = self.loop.scheduler
        prediction = self.loop.guided(self.loop.transformer(*args, **kwargs))
        scheduler.step(prediction, scheduler.timesteps[scheduler.index], latents)
        return self.loop.unguided(scheduler.taken)
