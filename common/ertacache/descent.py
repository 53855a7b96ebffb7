"""Matrices of channels that bring the final latents nearest to the reference's, by gradient descent on whole runs.

Refinement (`refinement`) nudges one coefficient after another, which thousands of them do not allow. The gradient of
the whole accelerated run costs about as much as three more of them, whatever the number of coefficients; so here the
matrices at the end of every segment are fitted together, on a few prompts at a time. So many coefficients owe much to
their prompts: the last quarter of these is left out, and the state that did best on it is kept.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ertacache.channels import Layout
from ertacache.errors import CalibrationError, NumericsError
from ertacache.gradients import differentiable, go_back
from ertacache.linearisation import segment_ends
from ertacache.matrices import GramRun, MatrixRun, MatrixUnknowns, whitened
from ertacache.rectification import Coefficients
from ertacache.rerun import Rerun
from ertacache.runs import Runs, mean_log_error
from ertacache.weighting import ERROR_FLOOR

FEWEST_PROMPTS = 8
LEFT_OUT = 4  # one prompt in so many
BATCH = 16  # prompts of a step
EVERY = 20  # steps between two evaluations
RATE = 0.012  # of Adam, in units of `matrices.SCALE`
BETAS = (0.9, 0.99)
WARM_UP = 10  # steps
LAST_RATE = 0.02  # share of the rate that is left in the end
BACKWARD = 3  # a backward pass takes two forward ones, and the checkpointed call is made again


@dataclass
class Descended:
    """What descent led to.

    Attributes:
        before, after: error of the final latents, as `Runs.final_error`, on the prompts left out.
    """

    coefficients: Coefficients
    left_out: list[int]
    before: float
    after: float


def parts(prompts: int) -> tuple[list[int], list[int]]:
    """Rows of the prompts that are fitted to and of those that are left out.

    Raises:
        CalibrationError: there are too few.
    """
    if prompts < FEWEST_PROMPTS:
        raise CalibrationError(
            f"descent needs {FEWEST_PROMPTS} calibration prompts or more, since a quarter is left out of the fit; "
            f"there are {prompts}: use more of them, or descent=0"
        )
    fitted = prompts - prompts // LEFT_OUT
    return list(range(fitted)), list(range(fitted, prompts))


def known_layout(runs: Runs) -> Layout:
    """Where the channels of the recorded latents are; raises CalibrationError where that cannot be told."""
    if runs.layout is None:
        raise CalibrationError("descent needs latents whose channels are known: calibrate with descent=0")
    return runs.layout


def descent_evaluations(computed_steps: int, prompts: int, steps: int) -> int:
    """Transformer evaluations that `descend` is worth, over all prompts: every step, and every look at the errors."""
    looks = 1 + math.ceil(steps / EVERY)
    batch = min(BATCH, len(parts(prompts)[0]))
    return computed_steps * (looks * prompts + steps * (1 + BACKWARD) * batch)


def descend(runs: Runs, schedule: list[int], start: Coefficients, steps: int) -> Descended:
    """Coefficients whose final latents are nearer to the reference's on the prompts left out, or those given.

    Args:
        runs: recorded calibration runs of 8 prompts or more.
        start: coefficients that were fitted without the prompts of the second of `parts`.
        steps: of the descent, each on 16 prompts; 80 do.

    Raises:
        CalibrationError: too few prompts, channels that cannot be told, or a model that lets no gradient through.
    """
    fitted, left_out = parts(len(runs))
    matrices, errors = _nominal(runs, schedule, start, fitted)
    error = mean_log_error(errors[left_out])
    best = Descended(start, left_out, error, error)
    if not matrices.values:
        return best
    optimiser = torch.optim.Adam(list(matrices.values.values()), lr=RATE, betas=BETAS)
    with differentiable(runs.pipe):
        for step, rows in zip(range(steps), batches(fitted), strict=False):
            for group in optimiser.param_groups:
                group["lr"] = rate(step, steps)
            try:
                add_gradient(runs.of(rows), schedule, start, matrices, float(errors[fitted].median()))
                optimiser.step()
                if (step + 1) % EVERY and step + 1 < steps:
                    continue
                made = matrices.coefficients(start)
                with torch.no_grad():
                    errors = runs.squared_errors(runs.run(Rerun(schedule, made)))
            except NumericsError:  # it went too far; what was best until then is kept
                break
            error = mean_log_error(errors[left_out])
            if error < best.after:
                best = Descended(made, left_out, best.before, error)
    return best


def _nominal(runs: Runs, schedule: list[int], start: Coefficients, fitted: list[int]) -> tuple[MatrixUnknowns, Tensor]:
    """The unknowns at the start, and the squared error of each prompt there."""
    layout, recorded = known_layout(runs), runs.recorded
    measured = GramRun(schedule, start, layout, segment_ends(schedule, recorded.num_steps), fitted)
    errors = runs.squared_errors(runs.run(measured))
    return whitened(measured.grams, recorded.gains, recorded.latents[0], start, layout), errors


def batches(fitted: Sequence[int]) -> Iterator[list[int]]:
    """Rows of 16 prompts at a time, or of all where there are fewer, in an order that is always the same."""
    generator = torch.Generator().manual_seed(0)
    size = min(BATCH, len(fitted))
    while True:
        order = [fitted[i] for i in torch.randperm(len(fitted), generator=generator).tolist()]
        for first in range(0, len(order) - size + 1, size):
            yield order[first : first + size]


def rate(step: int, steps: int) -> float:
    """The learning rate at a step: a warm-up times half a cosine that ends at a share of it."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return RATE * min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def objective(errors: Tensor, median: float) -> Tensor:
    """log(E_p + q median E) of squared errors E (P,), whose mean is the loss; see `weighting`."""
    return (errors + ERROR_FLOOR * median).clamp_min(1e-20).log()


def add_gradient(
    batch: Runs, schedule: list[int], start: Coefficients, matrices: MatrixUnknowns, median: float
) -> None:
    """Put the gradient of the mean `objective` over a batch of runs into the unknowns.

    A few prompts at a time, as the transformer sees them, so that the latents of a whole run fit into memory too.
    """
    for value in matrices.values.values():
        value.grad = None
    # so that half precision holds the gradient of the latents: it is about 1 then
    scale = batch.recorded.latents[0][0].numel() * max(median, 1e-20) ** 0.5
    for first in range(0, len(batch), batch.micro_batch):
        few = batch.of(range(first, min(first + batch.micro_batch, len(batch))))
        final = few.run(MatrixRun(schedule, start, matrices), gradients=True)
        go_back(objective(few.squared_errors(final), median).sum() * (scale / len(batch)))
        few.bar.update(BACKWARD * len(schedule) * len(few))
    for value in matrices.values.values():
        assert value.grad is not None  # every matrix has a part in the final latents
        value.grad /= scale
