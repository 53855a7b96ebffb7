"""Least squares that serve a mean of decibels: weights of prompts, normal equations, and a ridge."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ertacache.fit.record import Array

REWEIGHTINGS = 3  # rounds of least squares; the weights hardly move after the second
ERROR_FLOOR = 0.1  # q: share of the median error below which a prompt gains no more weight
RIDGE = 1e-2  # relative, on differences of outputs: four prompts are enough for six outputs with it


def prompt_weights(errors: Array) -> Array:
    """1 / (E_p + q median E) of squared errors E (P,), with mean 1; all 1 where a prompt has no error at all."""
    softened = errors + ERROR_FLOOR * np.median(errors)
    if not softened.min() > 0:
        return np.ones(len(errors))
    weights = 1 / softened
    return weights / weights.mean()


def grams(tensors: Sequence[Tensor]) -> Array:
    """Inner products <t_i, t_j> of m tensors (P, ...) for each prompt, (P, m, m) in float64."""
    products = []
    for prompt in range(len(tensors[0])):  # one at a time, since the float64 copies of videos are large
        stacked = torch.stack([t[prompt].double().flatten() for t in tensors])
        products.append((stacked @ stacked.T).cpu().numpy())
    return np.stack(products)


def solve_towards_plain(matrix: Array, vector: Array, ridge: float = RIDGE) -> list[float]:
    """Coefficients that solve the normal equations, ridge-shrunk towards the plain solution (1, 0, ...).

    The ridge acts on the newest output and on the differences between neighbouring ones, relative to the size of each:
    the outputs themselves are so much alike that a ridge on them could not tell small from large. Relative, it means
    the same at every step and in every model; it also keeps a singular matrix (two identical outputs) solvable.
    """
    plain = np.eye(len(vector))[0]
    # rows: o_1, o_1 - o_2, o_2 - o_3, ...
    differences = np.vstack([plain, (np.eye(len(vector)) - np.eye(len(vector), k=1))[:-1]])
    inner = differences @ matrix @ differences.T
    size = np.diag(inner).copy()
    size[size <= 0] = 1.0
    deviation = np.linalg.solve(inner + ridge * np.diag(size), differences @ (vector - matrix @ plain))
    return [float(a) for a in plain + differences.T @ deviation]


def fit_combination(columns: Sequence[Tensor], target: Tensor, ridge: float = RIDGE) -> list[float]:
    """Coefficients of `columns`, newest computed output first, for the output `target`; tensors are (P, ...).

    Quality is the mean over prompts of a logarithm (PSNR), which plain least squares serves badly: it follows the
    few prompts with the largest errors. So prompt p weighs 1 / (E_p + q median E), E_p its squared error under
    the coefficients of the round before: iteratively reweighted least squares for sum_p log(E_p + q median E).
    """
    products = grams([*columns, target])
    matrices, vectors, squares = products[:, :-1, :-1], products[:, :-1, -1], products[:, -1, -1]
    weights = np.ones(len(squares))
    for _ in range(REWEIGHTINGS if len(squares) > 1 else 1):
        fitted = solve_towards_plain(np.tensordot(weights, matrices, 1), np.tensordot(weights, vectors, 1), ridge)
        a = np.asarray(fitted)
        errors = np.maximum(squares - 2 * vectors @ a + np.einsum("i,pij,j->p", a, matrices, a), 0)
        weights = prompt_weights(errors)
    return fitted
