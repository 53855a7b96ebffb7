"""Stage 2: choose the computed steps.

Dynamic programming over each segment's least-squares residual on the cached outputs. A segment is a computed step with
the reused steps that follow it. The fit takes the state across it by a combination of the last computed outputs, so
what a segment costs is what that combination cannot reach, and it depends on the computed steps before: several paths
are kept to every step.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ertacache.calibration import check_computed_steps
from ertacache.fit.record import Array, Record, gram_matrix
from ertacache.fit.step_by_step import OUTPUTS

Steps = NDArray[np.int64]

PATHS_KEPT = 4  # for each number of computed steps and last computed step
RIDGE = 1e-3  # relative to the size of each output, towards reusing the newest one
BLOCK = 2**17  # numbers of one kind at a time in the search: what the processor's own memory holds
EARLY = (3.0, 2.0)  # how much more, as exponents, an early error weighs: tried in this order


def choose_steps(record: Record, computed_steps: int, early: float = EARLY[0]) -> list[int]:
    """Choose the K computed steps."""
    weights = error_weights(record.num_steps, early)
    return path_schedule(gram_matrix(record.outputs), np.asarray(record.gains), computed_steps, OUTPUTS, weights)


def error_weights(num_steps: int, early: float) -> Array:
    """How much a squared error after step k weighs in the end, (N,): exp(b (1 - k / N)^2 - 1), and 1 at the last step.

    An error grows on the way, the more the earlier it was made; what later steps cannot mend is left.
    """
    weights = np.exp(early * (1 - np.arange(num_steps) / num_steps) ** 2 - 1)
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

    def spans(self, paths: Steps) -> Array:
        """(n, L, L): the rows W of a path make combinations of its outputs that are orthonormal.

        Args:
            paths: (n, L), the last computed steps, newest first; each row's may be repeated at its end.
        """
        # of outputs at unit length, so that those of a silent model do no harm
        size = np.sqrt(self.gram.diagonal())[paths]
        scale = 1 / np.where(size > 0, size, 1.0)
        anchors = self.gram[paths[:, :, None], paths[:, None, :]] * scale[:, :, None] * scale[:, None, :]
        # a path with fewer steps than L repeats its oldest one, which costs a little less ridge
        return _whitening(anchors + RIDGE * np.eye(paths.shape[1])) * scale[:, None, :]

    def __call__(self, paths: Steps, spans: Array | None = None, ends: tuple[int, int] | None = None) -> Array:
        """Costs (n, E) of the segments from the last step of each path up to step m, for m in a range of E steps.

        Args:
            paths: see `spans`.
            spans: of these paths, where they are known.
            ends: the range, 0 to N + 1 by default.
        """
        first, last = ends or (0, len(self.between))
        newest = paths[:, 0]
        spans = self.spans(paths) if spans is None else spans
        reach = self.onto[:, first:last][paths]  # (n, L, E)
        reach -= self.onto[paths, newest[:, None]][:, :, None]
        steps = np.arange(first, last)
        # squared length of the segment's increments
        cost = -2 * self.between[newest, first:last]
        cost += self.between.diagonal()[first:last]
        cost += self.between[newest, newest][:, None]
        # of what plain reuse leaves of them
        plain = self.length[None, first:last] - self.length[newest][:, None]
        cost -= plain * (2 * reach[:, 0] - plain * self.gram[newest, newest][:, None])
        # less that of what the outputs span of the rest
        reach -= self.gram[paths, newest[:, None]][:, :, None] * plain[:, None]
        reach = spans @ reach
        cost -= np.einsum("nle,nle->ne", reach, reach)
        np.maximum(cost, 0, out=cost)
        cost[steps <= newest[:, None]] = np.inf
        return cost


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
    """The K computed steps, step 0 among them, with the smallest weighted sum of segment costs.

    O(N^2 K) in time; in memory three matrices (N, N) and O(N K).

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
    recent, totals = np.zeros((1, history_length), dtype=np.int64), np.zeros(1)  # last steps, newest first
    links: list[tuple[Steps, Steps]] = []  # of every path its newest step, and the path that it extends
    for count in range(1, computed_steps):
        # as many steps must be left as are still to be computed
        ends = (count, num_steps - (computed_steps - count) + 1)
        chosen, totals, step = _extended(costs, recent, totals, after, ends)
        links.append((step, chosen))
        # the padding repeats the oldest step until there are enough
        recent = np.concatenate([step[:, None], recent[chosen, : history_length - 1]], axis=1)
    last = totals + costs(recent, ends=(num_steps, num_steps + 1))[:, 0] * after[num_steps]
    return _followed(links, int(np.argmin(last)))


def _followed(links: list[tuple[Steps, Steps]], path: int) -> list[int]:
    """The steps of a whole path, from its last one back to step 0."""
    schedule = []
    for steps, extended in reversed(links):
        schedule.append(int(steps[path]))
        path = int(extended[path])
    return [0, *reversed(schedule)]


def _extended(
    costs: SegmentCosts, recent: Steps, totals: Array, after: Array, ends: tuple[int, int]
) -> tuple[Steps, Array, Steps]:
    """The PATHS_KEPT cheapest extensions to every step of a range: what they extend, their totals and their steps."""
    once, place = _distinct(recent, len(after))
    spans = costs.spans(once)
    kept = min(PATHS_KEPT, len(recent))
    chosen = np.zeros((kept, ends[1] - ends[0]), dtype=np.int64)
    found = np.full(chosen.shape, np.inf)
    for first, last in _blocks(ends, len(once) * recent.shape[1]):
        possible = once[:, 0] < last - 1
        cost = np.full((len(once), last - first), np.inf)
        cost[possible] = costs(once[possible], spans[possible], (first, last))
        extended = np.ascontiguousarray(cost.T)[:, place] * after[first:last, None] + totals
        for rank in range(kept):
            best = extended.argmin(axis=1)[:, None]  # the first of equal ones
            chosen[rank, first - ends[0] : last - ends[0]] = best[:, 0]
            found[rank, first - ends[0] : last - ends[0]] = np.take_along_axis(extended, best, axis=1)[:, 0]
            np.put_along_axis(extended, best, np.inf, axis=1)
    possible = np.isfinite(found)
    return chosen[possible], found[possible], np.nonzero(possible)[1] + ends[0]


def _distinct(recent: Steps, base: int) -> tuple[Steps, Steps]:
    """The rows (n, L) without repetitions, and for every row where it is among them: paths often differ long ago."""
    key = recent @ base ** np.arange(recent.shape[1])
    _, first, place = np.unique(key, return_index=True, return_inverse=True)
    return recent[first], place


def _blocks(ends: tuple[int, int], height: int) -> Iterator[tuple[int, int]]:
    """The range in pieces of about BLOCK numbers at `height` numbers a step."""
    size = max(1, BLOCK // height)
    for first in range(ends[0], ends[1], size):
        yield first, min(first + size, ends[1])
