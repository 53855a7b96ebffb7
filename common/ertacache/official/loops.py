"""Loops of other packages as pipelines that can be calibrated: transformer, scheduler, and a call.

    loop = wan(wan_t2v)                                    # WanT2V of the official package
    calibration = ertacache.calibrate(loop, prompts, seeds=range(8), speedup=2.0, size=(832, 480), sampling_steps=50)

Such a loop makes its scheduler inside. While it runs, what it makes it with gives it the adapter's own.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
