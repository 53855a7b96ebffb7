"""Closed-form rectification: on-policy combinations of cached outputs.

At every step the scheduler gets sum_j (a_j o_j + M_j^T o_j) + b x: a combination of the last computed outputs o_j,
newest first, and of the latents x that the step starts from. The a_j are numbers that all channels share and solve a
small least-squares problem towards the output that puts the state back on the reference; prompts weigh in it by how
well they do, since quality is counted in decibels. The matrices M_j of channels (channels.py) and the b of the
latents (refinement.py) are left out where they would not serve prompts that were not fitted to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ertacache.channels import ChannelMatrices, PlacedMatrices, StepMatrices
from ertacache.weighting import REWEIGHTINGS, prompt_weights

DEFAULT_RIDGE = 1e-6
LATENTS = -1  # index of the latents' coefficient among those of a step


@dataclass(frozen=True)
class Coefficients:
    """What every step of a run combines.

    Attributes:
        outputs: for each step the a_j of the last computed outputs, newest first.
        latents_coefficients: for each step the b of the latents it starts from.
        matrices: the M_j of channels, that are added to the a_j; None where there are none.
    """

    outputs: list[list[float]]
    latents_coefficients: list[float]
    matrices: ChannelMatrices | None = None
    _placed: dict[torch.device, list[PlacedMatrices | None]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_outputs(cls, outputs: list[list[float]]) -> "Coefficients":
        """Those of computed outputs alone: neither latents nor channels take part."""
        return cls(outputs, [0.0] * len(outputs))

    @property
    def longest(self) -> int:
        """Outputs that are kept, at least 1."""
        return max(map(len, self.outputs), default=1)

    def plain(self, step: int) -> bool:
        """Whether the step takes the newest output as it is."""
        mixed = self.matrices is not None and bool(self.matrices.steps[step])
        return self.outputs[step] == [1.0] and self.latents_coefficients[step] == 0 and not mixed

    def prepare(self, device: torch.device) -> None:
        """Before a sampling loop: put what its steps need on a device, so that none of them waits for it."""
        if self.matrices is not None and device not in self._placed:
            self._placed[device] = self.matrices.with_shared(self.outputs, device)

    def at(self, step: int, latents: Tensor) -> tuple[list[float], Tensor, float, PlacedMatrices | None]:
        """What `combine` takes after the outputs at that step, which starts from `latents`."""
        self.prepare(latents.device)
        matrices = self._placed[latents.device][step] if self.matrices is not None else None
        return self.outputs[step], latents, self.latents_coefficients[step], matrices

    def of_step(self, step: int) -> tuple[list[float], float, StepMatrices]:
        """The a_j, b and M_j of a step."""
        matrices = self.matrices.steps[step] if self.matrices else []
        return self.outputs[step], self.latents_coefficients[step], matrices

    def value(self, place: tuple[int, int]) -> float:
        """The coefficient at a place as in `changed`."""
        step, index = place
        return self.latents_coefficients[step] if index == LATENTS else self.outputs[step][index]

    def changed(self, places: Sequence[tuple[int, int]], change: Sequence[float]) -> "Coefficients":
        """With `change` added at `places`, pairs of step and index of an output, or step and LATENTS."""
        outputs, latents = [list(row) for row in self.outputs], list(self.latents_coefficients)
        for (step, index), value in zip(places, change, strict=True):
            if index == LATENTS:
                latents[step] += float(value)
            else:
                outputs[step][index] += float(value)
        return Coefficients(outputs, latents, self.matrices)


def combine(
    outputs: Sequence[Tensor],
    coefficients: Sequence[float],
    latents: Tensor | None = None,
    latents_coefficient: float = 0.0,
    matrices: PlacedMatrices | None = None,
) -> Tensor:
    """sum_j (a_j o_j + M_j^T o_j) + b x, computed in float32, in the dtype of the first output.

    Args:
        outputs: the newest computed output first, all of one shape.
        coefficients: a_j, one for each output that is used; [1.0] returns the newest as it is. Not looked at where the
            matrices hold them already.
        latents: x, those that the step starts from, in the shape of an output; not looked at where b is 0.
        latents_coefficient: b.
        matrices: the M_j of the step, as `Coefficients.at` gives them.
    """
    newest = outputs[0]
    if len(coefficients) == 1 and coefficients[0] == 1.0 and latents_coefficient == 0 and matrices is None:
        return newest
    if matrices is not None and matrices.of_tokens is not None:
        total = matrices.sum_of_tokens(outputs)
    else:
        total = _shared_sum(outputs, coefficients)
        if matrices is not None:
            matrices.add_to(total, outputs)
    if latents_coefficient != 0 and latents is not None:
        total.add_(latents, alpha=latents_coefficient)
    return total.to(newest.dtype)


def _shared_sum(outputs: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_j a_j o_j, in one float32 tensor in all."""
    newest = outputs[0]
    # what .float() returns may be the cached output itself and must not be written to
    total = newest * coefficients[0] if newest.dtype == torch.float32 else newest.float().mul_(coefficients[0])
    for index in range(1, min(len(outputs), len(coefficients))):
        total.add_(outputs[index], alpha=coefficients[index])
    return total


def drift_target(reference_next: Tensor, step_offset: Tensor, gain: float) -> Tensor:
    """o* = (x_ref_{i+1} - F_i(x_i)) / c_i: the output that puts a drifted state back on the reference."""
    return (reference_next - step_offset) / gain


def normal_equations(columns: Sequence[Tensor], target: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H^T H (P, m, m), H^T o* (P, m) and o*^T o* (P,) of each of P prompts, in float64.

    Args:
        columns: m tensors (P, ...).
        target: (P, ...).
    """
    products = []
    for prompt in range(len(target)):  # one at a time, since the float64 copies of videos are large
        stacked = torch.stack([t[prompt].double().flatten() for t in (*columns, target)])
        products.append((stacked @ stacked.T).cpu().numpy())
    grams = np.stack(products)
    return grams[:, :-1, :-1], grams[:, :-1, -1], grams[:, -1, -1]


def solve_towards_plain(matrix: np.ndarray, vector: np.ndarray, ridge: float = DEFAULT_RIDGE) -> list[float]:
    """Coefficients that solve the normal equations, ridge-shrunk towards the plain solution (1, 0, ...).

    The ridge is relative to the diagonal, so that it means the same at every step and in every model; it also
    keeps a singular matrix (two identical outputs) solvable.
    """
    plain = np.zeros(len(vector))
    plain[0] = 1.0
    diagonal = np.diag(matrix).copy()
    diagonal[diagonal <= 0] = 1.0
    deviation = np.linalg.solve(matrix + ridge * np.diag(diagonal), vector - matrix @ plain)
    return [float(a) for a in plain + deviation]


def fit_rectification(columns: Sequence[Tensor], target: Tensor, ridge: float = DEFAULT_RIDGE) -> list[float]:
    """Coefficients of `columns`, newest computed output first, for the output `target`; tensors are (P, ...).

    Quality is the mean over prompts of a logarithm (PSNR), which plain least squares serves badly: it follows the
    few prompts with the largest errors. So prompt p weighs 1 / (E_p + q median E), E_p its squared error under
    the coefficients of the round before: iteratively reweighted least squares for sum_p log(E_p + q median E).
    """
    matrices, vectors, squares = normal_equations(columns, target)
    weights = np.ones(len(squares))
    for _ in range(REWEIGHTINGS if len(squares) > 1 else 1):
        fitted = solve_towards_plain(np.tensordot(weights, matrices, 1), np.tensordot(weights, vectors, 1), ridge=ridge)
        a = np.asarray(fitted)
        errors = np.maximum(squares - 2 * vectors @ a + np.einsum("i,pij,j->p", a, matrices, a), 0)
        weights = prompt_weights(errors)
    return fitted
