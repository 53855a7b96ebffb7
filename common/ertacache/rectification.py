"""Closed-form rectification: on-policy combinations of cached outputs, and the paper's error model.

Ours: at every step the scheduler gets a combination of the last computed outputs, whose scalar coefficients
solve a small least-squares problem towards the output that puts the state back on the reference.
Paper: the additive error of a reused output is modelled as sigma(K o + B), linearised, and subtracted.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DEFAULT_RIDGE = 1e-6


def combine(outputs: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_j a_j o_j in float32, returned in the dtype of the first output.

    Args:
        outputs: the newest computed output first, all of one shape.
        coefficients: one for each output that is used; [1.0] returns the newest as it is.
    """
    newest = outputs[0]
    if len(coefficients) == 1 and coefficients[0] == 1.0:
        return newest
    total = newest.float() * coefficients[0]
    for index in range(1, min(len(outputs), len(coefficients))):
        total = total.add_(outputs[index].float(), alpha=coefficients[index])
    return total.to(newest.dtype)


def drift_target(reference_next: Tensor, step_offset: Tensor, gain: float) -> Tensor:
    """o* = (x_ref_{i+1} - F_i(x_i)) / c_i: the output that puts a drifted state back on the reference."""
    return (reference_next - step_offset) / gain


def normal_equations(columns: Sequence[Tensor], target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """H^T H (m, m) and H^T o* (m,) in float64, pooled over all elements of all prompts."""
    stacked = torch.stack([c.double().flatten() for c in columns])
    matrix = stacked @ stacked.T
    vector = stacked @ target.double().flatten()
    return matrix.cpu().numpy(), vector.cpu().numpy()


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
    """Least-squares coefficients of `columns`, newest computed output first, for the output `target`."""
    return solve_towards_plain(*normal_equations(columns, target), ridge)


def fit_error_model(reused: Tensor, output: Tensor) -> tuple[float, float]:
    """K and B of the paper's error model e = sigma(K o~ + B), linearised: sigma(z) ~ z / 4 + 1 / 2.

    The error e = o~ - o of the reused output o~ then has slope K / 4 and intercept B / 4 + 1 / 2 in o~, both
    found by ordinary least squares (arXiv 2508.21091, closed-form rectification).
    """
    x, error = reused.double().flatten(), (reused.double() - output.double()).flatten()
    centred = x - x.mean()
    variance = centred.square().mean()
    slope = float((centred * error).mean() / variance) if variance > 0 else 0.0
    intercept = float(error.mean()) - slope * float(x.mean())
    return 4 * slope, 4 * (intercept - 0.5)


def rectify(reused: Tensor, k: float, b: float) -> Tensor:
    """o~ - (z / 4 + 1 / 2) with z = K o~ + B: the reused output less its modelled error, in its own dtype."""
    as_float = reused.float()
    return (as_float - ((k * as_float + b) / 4 + 0.5)).to(reused.dtype)
