"""One training loop for every stage: progress, exponential moving average, checkpoints, resume."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tiny_training.muon import Muon

CHECKPOINT_EVERY_SECONDS = 240
WARMUP_STEPS = 200
HOLD_STEPS = 4000  # at the full rate, which falls with the root of the step after them
DECAY_FRACTION = 0.15
MAX_GRADIENT_NORM = 1.0
AVERAGED_SHARE = 12  # the averaged weights are of about the last one of so many parts of the training


def optimizers_for(model: nn.Module, learning_rate: float, muon: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices and kernels inside the blocks and AdamW for the rest."""
    inner, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # a table of modulations is no map from vectors to vectors
        mapping = parameter.ndim >= 4 or (parameter.ndim == 2 and "blocks." in name and not name.endswith("table"))
        (inner if muon and "block" in name and mapping else others).append(parameter)
    fused = all(parameter.is_cuda for parameter in others)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.01, fused=fused or None)
    ]
    if inner:
        optimizers.append(Muon(inner, lr=learning_rate, weight_decay=0.01))
    return optimizers


def learning_rate_factor(step: int, left: float, fresh: int = 0) -> float:
    """Linear warm-up, constant, then 1 / sqrt(step), and a linear decay to zero over the last DECAY_FRACTION.

    Before that last part nothing depends on the length of the training, so that it can be prolonged.

    Args:
        left: the fraction of the training that is left.
        fresh: step at which the optimisers began, without what earlier steps left in them.
    """
    warmup = min(1.0, (step - fresh + 1) / WARMUP_STEPS)
    falling = min(1.0, (HOLD_STEPS / (step + 1)) ** 0.5)
    return min(warmup, falling) * min(1.0, left / DECAY_FRACTION)


@dataclass
class Stage:
    """A resumable training stage of one model.

    `loss(step)` draws its batch from a generator seeded by the step, so that a resumed stage sees what an
    uninterrupted one would. `average` holds the moving average that is kept as the result. With `until`, what
    time.monotonic() then says, training ends there and not at `num_steps`.
    """

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    num_steps: int
    learning_rate: float
    folder: Path
    muon: bool = False
    until: float | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    fresh: int = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def run(self) -> nn.Module:
        """Train to the end, resuming from a checkpoint, and return the model with averaged weights.

        With no steps at all the model stays as it is.
        """
        if self.num_steps == 0 and self.until is None:
            return self.model.eval()
        # also where a parent process told this one to ignore Ctrl-C, and for a polite kill
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler)
        optimizers = optimizers_for(self.model, self.learning_rate, self.muon)
        start = step = self._resume(optimizers)
        began = saved = time.monotonic()
        steps = range(start, self.num_steps) if self.until is None else itertools.count(start)
        total = self.num_steps if self.until is None else None
        bar = tqdm(steps, initial=start, total=total, desc=self.name, mininterval=20)
        running, end = None, start if self.until is not None else self.num_steps
        try:
            for step in bar:
                left = self._left(step, began)
                if left <= 0:
                    break
                running, end = self._step(step, optimizers, running, left), step + 1
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{running.item():.4f}", refresh=False)
                if time.monotonic() > saved + CHECKPOINT_EVERY_SECONDS:
                    self._save(step + 1, optimizers)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self._save(step, optimizers)
            raise SystemExit(f"{self.name}: interrupted at step {step}; run again to resume") from None
        self.average = self.average or self.model.state_dict()  # where there was no time for a step
        self._save(end, optimizers)
        self.model.load_state_dict(self.average)
        return self.model.eval()

    def _left(self, step: int, began: float) -> float:
        """The fraction of the training that is left; of the present run's time where it ends by the clock."""
        if self.until is None:
            return (self.num_steps - step) / self.num_steps
        return (self.until - time.monotonic()) / max(self.until - began, 1e-9)

    def _step(self, step: int, optimizers: list[torch.optim.Optimizer], running: Tensor | None, left: float) -> Tensor:
        factor = learning_rate_factor(step, left, self.fresh)
        loss = self.loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._update_average(step)
        return loss.detach() if running is None else running.lerp(loss.detach(), 0.02)

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        state = self.model.state_dict()
        if not self.average:
            self.average = {key: value.clone() for key, value in state.items()}
        numbers = [key for key, value in state.items() if value.is_floating_point()]
        weight = AVERAGED_SHARE / (step + 1 + AVERAGED_SHARE)
        torch._foreach_lerp_([self.average[key] for key in numbers], [state[key] for key in numbers], weight)

    def _save(self, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "step": step,
                "model": self.model.state_dict(),
                "average": self.average,
                "optimizers": [o.state_dict() for o in optimizers],
            },
            temporary,
        )
        os.replace(temporary, self.checkpoint)

    def _resume(self, optimizers: list[torch.optim.Optimizer]) -> int:
        if not self.checkpoint.exists():
            return 0
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved.get("model", saved["average"]))
        present = self.model.state_dict()
        self.average = {key: value.to(present[key]) for key, value in saved["average"].items()}
        if "optimizers" in saved:
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        else:
            self.fresh = saved["step"]
        return saved["step"] if self.until is not None else min(saved["step"], self.num_steps)


@contextmanager
def small_checkpoints(work: Path, out: Path) -> Iterator[None]:
    """Leave checkpoints of a training in half precision and without optimisers in `out`, however the block ends.

    Where they lie in `work` in place of the whole ones, a training resumes from them.
    """
    try:
        yield
    finally:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*sorted(work.glob("flow-*.pt")), *work.glob("distil.pt")]:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            average = {k: v.half() if v.is_floating_point() else v for k, v in saved["average"].items()}
            torch.save({"step": saved["step"], "average": average}, out / ".new.tmp")
            os.replace(out / ".new.tmp", out / path.name)
            print(f"{out / path.name}: {saved['step']} steps, {(out / path.name).stat().st_size / 2**20:.1f} MiB")
