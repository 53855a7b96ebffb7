"""Fit matrices of channels: what they add to the coefficients that all channels share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ertacache.channels import Layout
from ertacache.fit.least_squares import REWEIGHTINGS, prompt_weights
from ertacache.fit.record import Array

MATRIX_RIDGE = 1e-2  # relative to the diagonal, on differences of outputs, towards the coefficients that all share
DECIMALS = 5  # that are kept, so that files stay small


def fit_channels(columns: Sequence[Tensor], target: Tensor, shared: Sequence[float], layout: Layout) -> Array:
    """The matrices M_j that minimise sum_p w_p || o* - sum_j a_j o_j - sum_j M_j^T o_j ||_p^2, ridge-shrunk to 0.

    The unknowns are those of the differences between an output and the next older one, and of the oldest: the
    outputs themselves are so much alike that a ridge on them would not tell small from large. Prompts weigh as in
    `least_squares.fit_combination`, in the first round by the errors that the shared coefficients leave.

    Args:
        columns: the m computed outputs o_j, newest first, (P, ...) each.
        target: the output o* that is wanted, (P, ...).
        shared: the m coefficients a_j.

    Returns:
        (outputs, channels from, channels to), without unit, rounded to DECIMALS.
    """
    grams = channel_grams([*columns, target], layout)  # (P, m + 1, C, m + 1, C)
    to_differences = np.eye(len(columns) + 1)
    to_differences[:-1, :-1] = neighbour_differences(len(columns))
    to_differences[-1, :-1] = -np.asarray(shared)  # the target less what the shared ones make
    grams = np.einsum("ij,pjckd,lk->picld", to_differences, grams, to_differences, optimize=True)
    count = grams.shape[1] - 1
    unknowns = count * grams.shape[2]
    matrices = grams[:, :-1, :, :-1].reshape(len(grams), unknowns, unknowns)
    vectors = grams[:, :-1, :, -1].reshape(len(grams), unknowns, -1)
    squares = np.einsum("pcc->p", grams[:, -1, :, -1])
    solution, errors = np.zeros(vectors.shape[1:]), squares
    for _ in range(REWEIGHTINGS if len(squares) > 1 else 1):
        weights = prompt_weights(errors)
        matrix = np.tensordot(weights, matrices, 1)
        diagonal = np.maximum(np.diag(matrix), 1e-300)
        solution = np.linalg.solve(matrix + MATRIX_RIDGE * np.diag(diagonal), np.tensordot(weights, vectors, 1))
        linear = np.einsum("pun,un->p", vectors, solution)
        quadratic = np.einsum("un,puv,vn->p", solution, matrices, solution, optimize=True)
        errors = np.maximum(squares - 2 * linear + quadratic, 0)
    by_difference = solution.reshape(count, -1, solution.shape[1])
    by_output = np.tensordot(to_differences[:-1, :-1].T, by_difference, 1)
    return np.round(by_output, DECIMALS)


def neighbour_differences(outputs: int) -> Array:
    """D (m, m): D o are the differences between each of m outputs and the next older one, and the oldest as it is.

    Where a matrix X_i is wanted for each of these, the one of output j is sum_i D[i, j] X_i.
    """
    return np.eye(outputs) - np.eye(outputs, k=1)


def channel_grams(tensors: Sequence[Tensor], layout: Layout) -> Array:
    """Inner products of the channels of the tensors, of each prompt, (P, m, C, m, C) in float64."""
    prompts = []
    for prompt in range(len(tensors[0])):  # one at a time, since the float64 copies of videos are large
        rows = torch.cat([layout.rows(tensor[prompt].double()) for tensor in tensors], dim=1)
        gram = (rows.T @ rows).view(len(tensors), -1, len(tensors), rows.shape[1] // len(tensors))
        prompts.append(gram.cpu().numpy())
    return np.stack(prompts)
