"""Which steps to compute when reused steps are rectified: the schedule whose segments are best spanned.

A segment is a computed step with the reused steps that follow it. Rectification takes the state across it by a
combination of the last computed outputs, so what a segment costs is what that combination cannot reach, and it
depends on the computed steps before. The dynamic programming therefore keeps several paths to every step.
"""

import numpy as np
from numpy.typing import NDArray

from ertacache.policy import check_computed_steps

Array = NDArray[np.float64]

PATHS_KEPT = 4  # for each number of computed steps and last computed step
RIDGE = 1e-12  # of the Gram matrix of outputs at unit length: those of neighbouring steps nearly agree


class SegmentCosts:
    """Squared least-squares residual of a segment's summed increments sum_k c_k o_k on the last computed outputs.

    Args:
        gram: (N, N), G[i, j] = <o_i, o_j>, averaged over prompts.
        gains: (N,), the c_k of solver.py.
    """

    def __init__(self, gram: Array, gains: Array):
        num_steps = len(gram)
        self.gram = gram
        # onto[m, a] = <sum over k < m of c_k o_k, o_a>
        self.onto = np.zeros((num_steps + 1, num_steps))
        np.cumsum(gains[:, None] * gram, axis=0, out=self.onto[1:])
        # between[m, n] = <sum over k < m of c_k o_k, sum over l < n of c_l o_l>
        self.between = np.zeros((num_steps + 1, num_steps + 1))
        np.cumsum(self.onto * gains[None, :], axis=1, out=self.between[:, 1:])

    def __call__(self, paths: NDArray[np.int64]) -> Array:
        """Costs (n, N + 1) of the segments from the last step of each path up to step m, for all m.

        Args:
            paths: (n, L), the last computed steps, newest first; each row's may be repeated at its end.
        """
        newest = paths[:, 0]
        # of outputs at unit length, so that those of a silent model do no harm
        size = np.sqrt(self.gram.diagonal())[paths]
        scale = 1 / np.where(size > 0, size, 1.0)
        # a path with fewer steps than L repeats its oldest one, which the ridge keeps solvable
        anchors = self.gram[paths[:, :, None], paths[:, None, :]] * scale[:, :, None] * scale[:, None, :]
        anchors = anchors + RIDGE * np.eye(paths.shape[1])
        reach = self.onto[:, paths].transpose(1, 0, 2)  # (n, N + 1, L)
        reach = (reach - reach[np.arange(len(paths)), newest][:, None]) * scale[:, None]
        steps = np.arange(len(self.between))
        square = self.between.diagonal()[None] - 2 * self.between[newest] + self.between[newest, newest][:, None]
        spanned = np.einsum("nml,nlm->nm", reach, np.linalg.solve(anchors, reach.transpose(0, 2, 1)))
        cost = np.maximum(square - spanned, 0)
        cost[steps[None] <= newest[:, None]] = np.inf
        return cost


def path_schedule(
    gram: Array, gains: Array, computed_steps: int, history_length: int, weights: Array | None = None
) -> list[int]:
    """The K computed steps, step 0 among them, with the smallest weighted sum of segment costs.

    Args:
        gram, gains: see `SegmentCosts`.
        history_length: computed outputs that a step combines.
        weights: (N,), how much a squared error that is left after step k weighs in the end; None for equal ones.
    """
    num_steps = len(gram)
    check_computed_steps(num_steps, computed_steps)
    costs = SegmentCosts(gram, gains)
    weight = np.ones(num_steps) if weights is None else np.asarray(weights)
    after = np.concatenate([[0.0], weight])  # a segment up to step m leaves its error after step m - 1
    paths, totals = np.zeros((1, 1), dtype=np.int64), np.zeros(1)  # whole paths, newest step first
    for count in range(1, computed_steps + 1):
        recent = paths[:, :history_length]
        recent = np.pad(recent, ((0, 0), (0, history_length - recent.shape[1])), mode="edge")
        # a weight of zero would make a number of what cannot be
        extended = totals[:, None] + costs(recent) * np.maximum(after, 1e-300)
        if count == computed_steps:
            return [int(step) for step in paths[np.argmin(extended[:, num_steps])][::-1]]
        # as many steps must be left as are still to be computed
        paths, totals = _kept(paths, extended[:, : num_steps - (computed_steps - count) + 1])
    raise AssertionError("unreachable")


def _kept(paths: NDArray[np.int64], extended: Array) -> tuple[NDArray[np.int64], Array]:
    """The PATHS_KEPT cheapest extensions to every step, with their totals."""
    order = np.argsort(extended, axis=0, kind="stable")[:PATHS_KEPT]  # (kept, steps)
    totals = np.take_along_axis(extended, order, axis=0)
    rank, step = np.nonzero(np.isfinite(totals))
    chosen = order[rank, step]
    return np.concatenate([step[:, None], paths[chosen]], axis=1), totals[rank, step]
