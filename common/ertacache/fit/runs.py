"""Run the pipeline on the calibration prompts again, with the same noise; in one batch where that is right."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ertacache.attach import Attachment, attached, blank_of
from ertacache.cache import Cache, Call
from ertacache.errors import CalibrationError, ERTACacheError
from ertacache.fit.lockstep import Lockstep, own_generators
from ertacache.fit.micro_batch import in_micro_batches
from ertacache.fit.record import Record, Recording
from ertacache.fit.work import counted, shares
from ertacache.intercept import Interception
from ertacache.metrics import psnr
from ertacache.solver import first_output

MICRO_BATCH = 8
# arguments of the pipeline that calibration sets itself; how many a prompt makes no part of a calibration
NOT_OURS = ("output_type", "generator", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")
TRIED_STEPS = 2  # at which a prompt's outputs alone must be those that it has among the others
# relative, of outputs that are the same but for the order of sums
SAME = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 0.1}


class TriedError(BaseException):  # which no pipeline logs
    """Ends a run at its first steps."""


class Trial(Recording):
    """Record the outputs of the first steps only."""

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        result = super().output(step, call, scheduler)
        if step + 1 >= TRIED_STEPS:
            raise TriedError
        return result


@dataclass
class Runs:
    """The calibration runs of one pipeline, and what was recorded of them.

    Attributes:
        prompts: of each run; None where the pipeline takes none.
        kwargs: arguments of the pipeline beside prompts and generators.
        per_prompt: further ones of which each run has its own.
        micro_batch: how many samples the transformer sees at a time.
        bar: progress bar, which counts a unit for each prompt of an evaluation.
        alone: whether each prompt is run in a call of its own; see lockstep.py.
        blanks: placeholders for one prompt, once the transformer ran; None where it must run at step 0.
        fills: whether networks are given objects that they may fill at step 0 for later ones, such as key-value caches.
        every_step: shares of a step's work that other modules do, by name.
        decodes: whether the pipeline fails for output_type "latent", so that all runs are decoded.
    """

    pipe: Any
    prompts: Sequence[str | None]
    seeds: list[int]
    kwargs: dict[str, Any]
    micro_batch: int
    bar: Any
    record: Record
    per_prompt: dict[str, list[Any]] = field(default_factory=dict)
    alone: bool = False
    blanks: list[Any] | None = None
    fills: bool = False
    every_step: dict[str, float] = field(default_factory=dict)
    decodes: bool = False

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

    def subset(self, rows: Sequence[int]) -> "Runs":
        """The runs of some prompts, with a record of their own."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            per_prompt={name: [values[row] for row in rows] for name, values in self.per_prompt.items()},
            record=self.record and self.record.subset(rows),
        )

    def first(self, count: int) -> "Runs":
        """The runs of the first prompts."""
        return self.subset(range(min(count, len(self))))

    def _run(self, cache: Cache, decode: bool, recording: Recording | None = None) -> Tensor:
        last: list[Tensor] = []

        def keep(step: int, latents: Tensor, stream: int) -> None:
            if stream == 0:
                if step == 0 and last:
                    raise CalibrationError(
                        "the pipeline makes several runs in one call, each with its own set_timesteps: calibrate with "
                        "arguments that need one run only (a shorter video); the calibration then serves all of them"
                    )
                last[:] = [latents]
                if cache.computes(step):  # an evaluation of each prompt, whatever guidance makes of it
                    self.bar.update(len(self))
            if recording is not None:
                recording.stepped(step, latents, stream)

        told = {} if recording is None else {"started": recording.started, "guided": recording.guided}
        kind = "pt" if decode or self.decodes else "latent"
        try:
            result = self._results(cache, keep, kind, **told)
        except ERTACacheError:
            raise
        except Exception:
            if kind == "pt":
                raise
            self.decodes = True
            return self._run(cache, decode, recording)
        # the scheduler's own last latents: what a pipeline returns as "latent" may be scaled or unpacked
        final = pixels_of(result, 1 if self.alone else len(self)) if decode else last[0]
        return final.detach().float().cpu()

    def _results(self, cache: Cache, keep: Callable[[int, Tensor, int], None], output_type: str, **told: Any) -> Any:
        """What the pipeline returns: one result of all prompts, or a list of results."""
        calls = [self._arguments([row], output_type) for row in range(len(self))]
        if self.alone:
            steps = Lockstep(cache, [partial(called, **call) for call in calls], self.seeds, keep)
            options = {**told, "call": self._call, "stepped": steps.stepped, "check": "step", "blanks": self.blanks}
            with attached(self.pipe, steps.begin, **options) as on:
                result = steps.run(self.pipe)
                self._learn(on, 1)
            return result
        options = {**told, "call": self._call, "stepped": keep, "check": "step", "blanks": self._blanks()}
        with attached(self.pipe, cache.begin, **options) as on, own_generators(self.seeds[0]):
            result = self.pipe(**self._arguments(range(len(self)), output_type))
            self._learn(on, len(self))
        return result

    def _arguments(self, rows: Sequence[int], output_type: str) -> dict[str, Any]:
        """Of a call for some of the prompts; for a single run, as one would make it."""
        generators = [torch.Generator("cpu").manual_seed(self.seeds[row]) for row in rows]
        own = {"prompt": self.prompts, **self.per_prompt} if self.prompts[0] is not None else self.per_prompt
        chosen = {name: [values[row] for row in rows] for name, values in own.items()}
        if self.alone:
            (generator,) = generators
            chosen = {name: values[0] for name, values in chosen.items()}
            return {**self.kwargs, **chosen, "generator": generator, "output_type": output_type}
        return {**self.kwargs, **chosen, "generator": generators, "output_type": output_type}

    def _blanks(self) -> list[Any] | None:
        return self.blanks and [blank_of(b, len(self) * len(first_output(b))) for b in self.blanks]

    def _learn(self, attachment: Attachment, prompts: int) -> None:
        """Keep placeholders for one prompt, where the transformer makes nothing but a tensor with the batch first."""
        self.blanks = None if self.fills else blanks_of_one(attachment.blanks, prompts)

    def _call(self, interception: Interception, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.fills = self.fills or not all(map(is_plain, (*args, *kwargs.values())))
        if self.alone:
            return interception.run(*args, **kwargs)
        return in_micro_batches(interception, args, kwargs, self.micro_batch)

    def repeats(self) -> bool:
        """Whether prompts alone, run for their first steps once more, give the outputs that were recorded.

        The first one and the last, which lies in another micro-batch and draws other noise than the first in a batch.
        """
        return all(replace(self.subset([row]), alone=True).same_again() for row in {0, len(self) - 1})

    def same_again(self) -> bool:
        """Whether these runs give the same outputs at their first steps once more."""
        trial = Trial()
        with suppress(TriedError):
            self._results(trial, trial.stepped, "pt", started=trial.started)
        self.bar.update(len(trial.outputs) * len(self))
        pairs = zip(trial.outputs, self.record.outputs, strict=False)
        return all(float((a.float() - b.float()).norm()) <= SAME[b.dtype] * float(b.float().norm()) for a, b in pairs)


def called(pipe: Any, **arguments: Any) -> Any:
    """What a pipeline returns."""
    return pipe(**arguments)


def record_runs(
    pipe: Any,
    prompts: str | Sequence[str] | None,
    seeds: Sequence[int],
    kwargs: dict[str, Any],
    *,
    per_prompt: Mapping[str, Sequence[Any]] | None = None,
    micro_batch: int = MICRO_BATCH,
    progress: bool = False,
    memory_limit: int | None = None,
    on_begin: Callable[[Any, int, int], None] = lambda bar, prompts, steps: None,
) -> Runs:
    """Record the uncached runs; prompt i with seed i, the shorter list repeated.

    All prompts are one batch where the first one then gets what it gets alone, and run side by side else.

    Args:
        per_prompt: further arguments of which each prompt has its own.
        on_begin: told the progress bar, the prompts and the steps before anything is computed.

    Raises CalibrationError: there is no prompt or no seed, or no run can be repeated.
    """
    given = {name: rows_of(name, values) for name, values in (per_prompt or {}).items()}
    texts: list[str | None] = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if prompts is None:
        texts = [None] * max(map(len, given.values()), default=0)
    seeds = list(seeds)
    if not texts or not seeds:
        raise CalibrationError("calibration needs at least one prompt and one seed")
    count = max(len(texts), len(seeds))
    alone, rest = bool(given), {}
    for name, value in kwargs.items():
        if isinstance(value, (list, tuple)) and "prompt" in name and len(value) == len(texts):
            given[name] = list(value)  # such as negative prompts
        elif name not in NOT_OURS:
            rest[name] = value
    for name, values in given.items():
        if len(values) != len(texts):
            raise CalibrationError(f"{name} holds {len(values)} values for {len(texts)} prompts: give each its own")
    bar = tqdm(total=None, desc="calibrate", unit="call", disable=not progress, leave=False)
    runs = Runs(
        pipe,
        [texts[i % len(texts)] for i in range(count)],
        [seeds[i % len(seeds)] for i in range(count)],
        rest,
        micro_batch,
        bar,
        record=None,  # type: ignore[arg-type]  # set below, before anybody reads it
        per_prompt={name: [values[i % len(values)] for i in range(count)] for name, values in given.items()},
        alone=alone,
    )

    def recorded() -> bool:
        recording = Recording(memory_limit, lambda steps: on_begin(bar, count, steps))
        with counted(pipe) as work:
            pixels = runs._run(recording, True, recording)
        runs.record = recording.record(pixels)
        runs.every_step = shares(work, pipe, count * sum(runs.record.branches[1:]))  # as of the others
        # in a batch nothing would tell which of several copies of the latents is whose, and some take one prompt of it
        return (runs.alone or len(runs.record) == count) and runs.repeats()

    if not runs.alone:
        try:
            if recorded():
                return runs
        except ERTACacheError:
            raise
        except Exception:
            if count == 1:
                raise
        runs.alone, runs.blanks = True, None
    if not recorded():
        raise CalibrationError(
            "the pipeline does not repeat itself: the same prompt and seed gave other outputs. Its noise, or a state "
            "that its transformer keeps between calls, is out of reach, so it cannot be calibrated"
        )
    return runs


def blanks_of_one(blanks: Sequence[Any], prompts: int) -> list[Any] | None:
    """Placeholders for one prompt from those for several; None where a network returns more than a batch of these."""
    plain = all(
        isinstance(b, (tuple, Mapping))
        and len(b) == 1
        and isinstance(first_output(b), Tensor)
        and len(first_output(b)) % prompts == 0
        for b in blanks
    )
    return [blank_of(b, len(first_output(b)) // prompts) for b in blanks] if plain and blanks else None


def is_plain(value: Any) -> bool:
    """Whether an argument holds tensors and plain values only."""
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return isinstance(value, (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device))


def rows_of(name: str, values: Any) -> list[Any]:
    """The values of each prompt; those of a tensor keep their batch dimension."""
    if isinstance(values, Tensor):
        return list(values.split(1))
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise CalibrationError(f"per_prompt[{name!r}] must be a list with one value for each prompt")
    return list(values)


def pixels_of(result: Any, count: int) -> Tensor:
    """The decoded results (P, ...) in [0, 1] of what a pipeline returns: a tensor, an array, or a list of these.

    Of a modular pipeline's state, the images or videos.

    Args:
        count: of results in what is returned, or in each item of a list: a single video may be frames alone.
    """
    if isinstance(result, list):
        found = [pixels_of(one, count) for one in result]
        if len({one.shape[1:] for one in found}) > 1:
            raise CalibrationError("the prompts give results of several sizes: calibrate with inputs of one size")
        return torch.cat(found)
    values = getattr(result, "values", None)
    if isinstance(values, dict):
        result = [next(values[name] for name in ("images", "videos", "audio") if values.get(name) is not None)]
    first = result[0]
    if isinstance(first, list):
        first = torch.stack([torch.as_tensor(one) for one in first])
    if not isinstance(first, Tensor) and not hasattr(first, "__array__"):
        raise CalibrationError(
            f"the pipeline returns {type(first).__name__} for output_type='pt': ERTACache reads tensors and arrays"
        )
    pixels = torch.as_tensor(first)
    return pixels if len(pixels) == count else pixels.reshape(count, -1, *pixels.shape[1:])


def mean_log_error(errors: Tensor) -> float:
    """Mean of the decimal logarithm of mean squared errors (P,); -10 times it is a mean of decibels."""
    return float(errors.clamp_min(1e-20).log10().mean())


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bars, and decode one sample at a time."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    vae = getattr(pipe, "vae", None)
    slicing = getattr(vae, "use_slicing", None)  # None where there is no VAE, or none that can
    set_bar = getattr(pipe, "set_progress_bar_config", lambda **_: None)
    set_bar(disable=True)
    if vae is not None and slicing is not None:
        vae.use_slicing = True
    try:
        yield
    finally:
        set_bar(**config)
        if vae is not None and slicing is not None:
            vae.use_slicing = slicing
