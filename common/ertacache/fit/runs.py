"""Run the pipeline on the calibration prompts again: all in one batch, with the same noise every time."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ertacache.attach import Attachment, Structure, attached
from ertacache.cache import Cache
from ertacache.errors import CalibrationError
from ertacache.fit.record import Array, Record, Recording, gram_matrix
from ertacache.intercept import Interception, uncompiled
from ertacache.metrics import psnr
from ertacache.solver import first_output

MICRO_BATCH = 8
NOT_OURS = ("output_type", "generator", "return_dict")  # arguments of the pipeline that calibration sets itself


@dataclass
class Runs:
    """The calibration runs of one pipeline, and what was recorded of them.

    Attributes:
        kwargs: arguments of the pipeline beside prompts and generators.
        micro_batch: how many samples the transformer sees at a time.
        bar: progress bar, which counts a unit for each prompt of an evaluation.
        structure: of what the transformer returns for one prompt, once it ran.
    """

    pipe: Any
    prompts: list[str]
    seeds: list[int]
    kwargs: dict[str, Any]
    micro_batch: int
    bar: Any
    record: Record
    structure: Structure | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def latents(self, cache: Cache) -> Tensor:
        """Final latents (P, ...) of the runs under a cache, float32 on the host."""
        return self._run(cache, decode=False)

    def pixels(self, cache: Cache) -> Tensor:
        """Decoded results (P, ...) in [0, 1] of the runs under a cache."""
        return self._run(cache, decode=True)

    def errors(self, cache: Cache) -> Tensor:
        """Mean squared error (P,) of the final latents under a cache."""
        return self.record.squared_errors(self.latents(cache))

    def quality(self, cache: Cache) -> Tensor:
        """PSNR (P,) in dB of the decoded results under a cache to the recorded ones."""
        return psnr(self.pixels(cache), self.record.pixels).float()

    def gram(self) -> Array:
        """The Gram matrix of the recorded outputs."""
        return gram_matrix(self.record.outputs)

    def subset(self, rows: Sequence[int]) -> "Runs":
        """The runs of some prompts, with a record of their own."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            record=self.record.subset(rows),
        )

    def first(self, count: int) -> "Runs":
        """The runs of the first prompts."""
        return self.subset(range(min(count, len(self))))

    def _run(self, cache: Cache, decode: bool, stepped: Any = None) -> Tensor:
        last: list[Tensor] = []

        def keep(step: int, latents: Tensor) -> None:
            last[:] = [latents]
            if cache.computes(step):  # an evaluation of each prompt, whatever guidance makes of it
                self.bar.update(len(self))
            if stepped is not None:
                stepped(step, latents)

        options = {"call": self._call, "stepped": keep, "check": "step", "structure": self._structure()}
        with self._attached(cache.begin, **options) as attachment:
            result = self._again("pt" if decode else "latent")
            self._learn(attachment.structure)
        # the scheduler's own last latents: what a pipeline returns as "latent" may be scaled or unpacked
        return (first_output(result) if decode else last[0]).detach().float().cpu()

    def _attached(self, begin: Callable[[Any], Cache], **options: Any) -> AbstractContextManager[Attachment]:
        return attached(self.pipe, begin, **options)

    def _again(self, output_type: str) -> Any:
        """Call the pipeline with the same noise."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        return self.pipe(prompt=self.prompts, generator=generators, output_type=output_type, **self.kwargs)

    def _structure(self) -> Structure | None:
        """Of the transformer's output for these prompts."""
        one = self.structure
        return one and one._replace(shape=torch.Size([one.shape[0] * len(self), *one.shape[1:]]))

    def _learn(self, structure: Structure | None) -> None:
        if structure is not None:  # its batch is that of the prompts, or twice that for guidance in one call
            per_prompt = structure.shape[0] // len(self)
            self.structure = structure._replace(shape=torch.Size([per_prompt, *structure.shape[1:]]))

    def _call(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        return in_micro_batches(interception, args, kwargs, self.micro_batch)


def record_runs(
    pipe: Any,
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    kwargs: dict[str, Any],
    *,
    micro_batch: int = MICRO_BATCH,
    progress: bool = False,
    memory_limit: int | None = None,
    on_begin: Callable[[Any, int, int], None] = lambda bar, prompts, steps: None,
) -> Runs:
    """Record the uncached runs; prompt i with seed i, the shorter list repeated.

    Args:
        on_begin: told the progress bar, the prompts and the steps before anything is computed.

    Raises CalibrationError: there is no prompt or no seed.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(seeds)
    if not prompts or not seeds:
        raise CalibrationError("calibration needs at least one prompt and one seed")
    count = max(len(prompts), len(seeds))
    bar = tqdm(total=None, desc="calibrate", unit="call", disable=not progress, leave=False)
    recording = Recording(memory_limit, lambda steps: on_begin(bar, count, steps))
    runs = Runs(
        pipe,
        [prompts[i % len(prompts)] for i in range(count)],
        [seeds[i % len(seeds)] for i in range(count)],
        {k: v for k, v in kwargs.items() if k not in NOT_OURS},
        micro_batch,
        bar,
        record=None,  # type: ignore[arg-type]  # set below, before anybody reads it
    )
    pixels = runs._run(recording, True, recording.stepped)
    runs.record = recording.record(pixels)
    return runs


def mean_log_error(errors: Tensor) -> float:
    """Mean of the decimal logarithm of mean squared errors (P,); -10 times it is a mean of decibels."""
    return float(errors.clamp_min(1e-20).log10().mean())


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bars, and decode one sample at a time."""
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


def in_micro_batches(interception: Interception, args: tuple, kwargs: dict[str, Any], size: int) -> Any:
    """Call a transformer on slices of its batch, so that its peak memory stays that of `size` samples.

    Tensors are sliced whose first dimension is the batch of the first argument; position ids are not.
    """
    module = interception.module
    bound = inspect.signature(type(uncompiled(module)).forward).bind(module, *args, **kwargs)
    names = list(bound.arguments)[1:]
    batch = bound.arguments[names[0]].shape[0] if names and isinstance(bound.arguments[names[0]], Tensor) else 1
    if batch <= size:
        return interception.run(*args, **kwargs)

    def piece(name: str, value: Any, start: int) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value[start : start + size] if batched and not name.endswith("_ids") else value

    parts = []
    for start in range(0, batch, size):
        output = interception.run(**{name: piece(name, bound.arguments[name], start) for name in names})
        last = start + size >= batch
        # the next call may write into the same memory: a CUDA graph replays with the same output tensor
        parts.append(first_output(output) if last else first_output(output).clone())
    joined = torch.cat(parts)
    return (joined,) if isinstance(output, tuple) else type(output)(joined)
