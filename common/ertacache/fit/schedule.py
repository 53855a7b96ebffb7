"""Stage 2: choose the computed steps.

Dynamic programming over each segment's least-squares residual on the cached outputs. A segment is a computed step with
the reused steps that follow it. The fit takes the state across it by a combination of the last computed outputs, so
what a segment costs is what that combination cannot reach, and it depends on the computed steps before: several paths
are kept to every step.
"""

import numpy as np
from numpy.typing import NDArray

from ertacache.calibration import check_computed_steps
from ertacache.fit.record import Array, Record, gram_matrix
from ertacache.fit.step_by_step import OUTPUTS

Steps = NDArray[np.int64]

PATHS_KEPT = 4  # for each number of computed steps and last computed step
RIDGE = 1e-3  # relative to the size of each output, towards reusing the newest one
EARLY = 3.0  # how much more an early error weighs, as an exponent


def choose_steps(record: Record, computed_steps: int) -> list[int]:
    """Choose the K computed steps."""
    weights, gram = error_weights(record.num_steps), gram_matrix(record.outputs)
    if record.streams:  # one schedule for all, each by its own size
        grams = [gram, *(gram_matrix(stream.outputs) for stream in record.streams)]
        gram = sum((one / max(float(one.trace()), 1e-300) for one in grams), np.zeros_like(gram))
    return path_schedule(gram, np.asarray(record.gains), computed_steps, OUTPUTS, weights)


def error_weights(num_steps: int) -> Array:
    """How much a squared error after step k weighs in the end, (N,): exp(b (1 - k / N)^2 - 1), and 1 at the last step.

    An error grows on the way, the more the earlier it was made; what later steps cannot mend is left.
    """
    weights = np.exp(EARLY * (1 - np.arange(num_steps) / num_steps) ** 2 - 1)
    weights[-1] = 1.0
    return weights


class SegmentCosts:
    """Squared residual of a segment's increments sum_k c_k o_k on the last computed outputs, with a ridge.

    The ridge keeps coefficients near plain reuse of the newest output, as the fit's does: min over a of
    |sum_k c_k o_k - sum_j a_j o_j|^2 + RIDGE sum_j |o_j|^2 (a_j - [j newest] sum_k c_k)^2.

    Args:
        gram: (N, N), G[i, j] = <o_i, o_j>, a mean over prompts and values (`record.gram_matrix`).
        gains: (N,), the c_k of solver.py.
    """

    def __init__(self, gram: Array, gains: Array):
        num_steps = len(gram)
        self.gram, self.length = gram, np.concatenate([[0.0], np.cumsum(gains)])
        # onto[a, m] = <o_a, sum over k < m of c_k o_k>: rows are what is read
        self.onto = np.zeros((num_steps, num_steps + 1))
        np.cumsum(gains[None, :] * gram.T, axis=1, out=self.onto[:, 1:])
        # between[m, n] = <sum over k < m of c_k o_k, sum over l < n of c_l o_l>
        self.between = np.zeros((num_steps + 1, num_steps + 1))
        np.cumsum(gains[:, None] * self.onto, axis=0, out=self.between[1:])

    def __call__(self, paths: Steps) -> Array:
        """Costs (n, N + 1) of the segments from the last step of each path up to step m; inf where m is no later.

        Args:
            paths: (n, L), the last computed steps, newest first; each row's oldest may be repeated at its end.
        """
        newest, steps = paths[:, 0], np.arange(len(self.between))
        # outputs at unit length, so that those of a silent model do no harm; rows W of a path span them, orthonormal
        size = np.sqrt(self.gram.diagonal())[paths]
        scale = 1 / np.where(size > 0, size, 1.0)
        anchors = self.gram[paths[:, :, None], paths[:, None, :]] * scale[:, :, None] * scale[:, None, :]
        spans = _whitening(anchors + RIDGE * np.eye(paths.shape[1])) * scale[:, None, :]
        reach = self.onto[paths] - self.onto[paths, newest[:, None]][:, :, None]  # (n, L, N + 1)
        # squared length of the segment's increments
        cost = self.between.diagonal() - 2 * self.between[newest] + self.between[newest, newest][:, None]
        # of what plain reuse leaves of them
        plain = self.length - self.length[newest][:, None]
        cost -= plain * (2 * reach[:, 0] - plain * self.gram[newest, newest][:, None])
        # less that of what the outputs span of the rest
        reach = spans @ (reach - self.gram[paths, newest[:, None]][:, :, None] * plain[:, None])
        cost -= np.einsum("nle,nle->ne", reach, reach)
        return np.where(steps > newest[:, None], np.maximum(cost, 0), np.inf)


def _whitening(gram: Array) -> Array:
    """W (n, L, L), lower triangular, with W G W^T = 1 for Gram matrices G (n, L, L); overwrites these.

    Elimination rather than an inverse, which would lose all digits where outputs are repeated. A direction without
    length spans nothing: its row is zero.
    """
    length = gram.shape[1]
    rows = np.tile(np.eye(length), (len(gram), 1, 1))
    for pivot in range(length):
        squared = gram[:, pivot, pivot].copy()
        inverse = np.divide(1.0, squared, out=np.zeros_like(squared), where=squared > 0)
        factor = gram[:, pivot + 1 :, pivot, None] * inverse[:, None, None]
        gram[:, pivot + 1 :] -= factor * gram[:, pivot, None]
        rows[:, pivot + 1 :] -= factor * rows[:, pivot, None]
        rows[:, pivot] *= np.sqrt(inverse)[:, None]
    return rows


def path_schedule(
    gram: Array, gains: Array, computed_steps: int, history_length: int, weights: Array | None = None
) -> list[int]:
    """The K computed steps, step 0 among them, with the smallest weighted sum of segment costs; O(N^2 K).

    Args:
        gram, gains: see `SegmentCosts`.
        history_length: computed outputs that a step combines.
        weights: (N,), how much a squared error that is left after step k weighs in the end; None for equal ones.
    """
    num_steps = len(gram)
    check_computed_steps(num_steps, computed_steps)
    costs = SegmentCosts(gram, gains)
    weight = np.ones(num_steps) if weights is None else np.asarray(weights)
    # a segment up to step m leaves its error after step m - 1; a weight of zero would make a number of what cannot be
    after = np.maximum(np.concatenate([[0.0], weight]), 1e-300)
    paths: list[tuple[float, list[int]]] = [(0.0, [0])]  # cost so far, and the computed steps, newest first
    for count in range(1, computed_steps):
        # as many steps must be left as are still to be computed
        ends = range(count, num_steps - (computed_steps - count) + 1)
        totals = _totals(costs, paths, history_length, after)
        paths = [
            (float(totals[row, end]), [end, *paths[row][1]])
            for end in ends
            for row in np.argsort(totals[:, end], kind="stable")[:PATHS_KEPT]
            if np.isfinite(totals[row, end])
        ]
    last = _totals(costs, paths, history_length, after)[:, num_steps]
    return paths[int(np.argmin(last))][1][::-1]


def _totals(costs: SegmentCosts, paths: list[tuple[float, list[int]]], length: int, after: Array) -> Array:
    """Cost (n, N + 1) of each path with a segment up to step m at its end."""
    # the padding repeats the oldest step until there are enough
    recent = np.array([(steps + steps[-1:] * length)[:length] for _, steps in paths])
    return np.array([total for total, _ in paths])[:, None] + costs(recent) * after
