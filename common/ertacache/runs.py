"""The calibration runs of a pipeline: every prompt in one batch, with the same noise every time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ertacache import solver
from ertacache.attach import Structure, attached
from ertacache.channels import Layout, layout_of
from ertacache.errors import CalibrationError
from ertacache.fitting import SAFE_FORM, Fitter, Form
from ertacache.gradients import checkpointed, undecorated
from ertacache.recording import Recorder

MICRO_BATCH = 8


@dataclass
class Runs:
    """The calibration runs of one pipeline: every prompt in one batch, the same noise every time."""

    pipe: Any
    prompts: list[str]
    seeds: list[int]
    kwargs: dict[str, Any]
    micro_batch: int
    bar: Any
    recorded: Recorder = field(default_factory=Recorder)
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))  # of the reference runs, once recorded
    structure: Structure | None = None  # of what the transformer returns, once it ran
    rows: list[int] | None = None  # of the recorded prompts that these are; None for all

    def __len__(self) -> int:
        return len(self.prompts)

    def run(self, controller: Any, decode: bool = False, gradients: bool = False) -> Tensor:
        """Run the pipeline under a controller; final latents, or pixels in [0, 1] with `decode`.

        Args:
            gradients: they carry those of what the controller combines; for runs within `gradients.differentiable`.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        with attached(self.pipe, controller, self.micro_batch) as attachment:
            attachment.on_computed = lambda: self.bar.update(len(self))
            attachment.expected = self.structure
            if gradients:
                attachment.around = checkpointed
            call = undecorated(self.pipe) if gradients else self.pipe
            result = call(
                prompt=self.prompts, generator=generators, output_type="pt" if decode else "latent", **self.kwargs
            )
            self.structure = attachment.expected
        final = solver.first_output(result)
        return (final if gradients else final.detach()).float().cpu()

    def first(self, count: int) -> "Runs":
        """The runs of the first prompts only."""
        return self.of(range(min(count, len(self))))

    def of(self, rows: Sequence[int]) -> "Runs":
        """The runs of the prompts in these rows only; `recorded` and `pictures` stay those of all."""
        structure = self.structure
        if structure is not None:  # its batch is that of the prompts, or twice that for guidance in one call
            kind, shape, dtype, device = structure
            structure = (kind, torch.Size([shape[0] * len(rows) // len(self), *shape[1:]]), dtype, device)
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            structure=structure,
            rows=[row if self.rows is None else self.rows[row] for row in rows],
        )

    def record(self) -> None:
        """The uncached reference runs, kept in `recorded` and `pictures`."""
        self.pictures = self.run(self.recorded, decode=True)

    def final_error(self, controller: Any) -> float:
        """Mean over prompts of the log mean squared error of the final latents under a controller."""
        return mean_log_error(self.squared_errors(self.run(controller)))

    def squared_errors(self, final: Tensor) -> Tensor:
        """Mean squared error of final latents (P, ...) of each prompt."""
        rows = slice(None) if self.rows is None else self.rows
        return (final - self.recorded.latents[-1][rows].float()).square().flatten(1).mean(1)

    def fitted_error(self, schedule: list[int], form: Form = SAFE_FORM) -> float:
        """`final_error` of a schedule with our rectification."""
        return self.final_error(Fitter(schedule, self.recorded.latents, form=form))

    @property
    def layout(self) -> Layout | None:
        """Of the recorded latents, where it can be told."""
        config = getattr(self.pipe.transformer, "config", None)
        return layout_of(self.recorded.latents[0].shape, getattr(config, "in_channels", None))


def mean_log_error(errors: Tensor) -> float:
    """Mean of the decimal logarithm of mean squared errors (P,); -10 times it is a mean of decibels."""
    return float(errors.clamp_min(1e-20).log10().mean())


def make_runs(
    pipe: Any,
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    kwargs: dict[str, Any],
    micro_batch: int,
    progress: bool,
    memory_limit: int | None = None,
) -> Runs:
    """Runs of a pipeline; prompt i with seed i, the shorter list repeated. Raises CalibrationError for none.

    Args:
        memory_limit: bytes of recorded trajectories that may stay in memory; see `Recorder`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(seeds)
    if not prompts or not seeds:
        raise CalibrationError("calibration needs at least one prompt and one seed")
    count = max(len(prompts), len(seeds))
    kwargs = {k: v for k, v in kwargs.items() if k not in ("output_type", "generator", "return_dict")}
    bar = tqdm(total=None, desc="calibrate", unit="call", disable=not progress, leave=False)
    return Runs(
        pipe,
        [prompts[i % len(prompts)] for i in range(count)],
        [seeds[i % len(seeds)] for i in range(count)],
        kwargs,
        micro_batch,
        bar,
        Recorder(memory_limit),
    )


def recorded_runs(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    micro_batch: int = MICRO_BATCH,
    progress: bool = False,
    memory_limit: int | None = None,
    **pipe_kwargs: Any,
) -> Runs:
    """The uncached reference runs that a calibration starts with, for studies of its parts."""
    runs = make_runs(pipe, prompts, seeds, pipe_kwargs, micro_batch, progress, memory_limit)
    with quiet(pipe), torch.no_grad():
        runs.record()
    return runs


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bars of the pipeline's own, and a VAE that decodes one sample at a time."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    vae = getattr(pipe, "vae", None)
    slicing = getattr(vae, "use_slicing", None)  # None where there is no VAE, or none that can
    pipe.set_progress_bar_config(disable=True)
    if vae is not None and slicing is not None:
        vae.use_slicing = True
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)
        if vae is not None and slicing is not None:
            vae.use_slicing = slicing
