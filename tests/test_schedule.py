"""The schedule whose segments are best spanned: its costs by hand, its search against brute force."""

import time
import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from ertacache import paths
from ertacache.errors import CalibrationError
from ertacache.fit.schedule import SegmentCosts, path_schedule


def smooth_outputs(num_steps: int, seed: int, size: int = 30) -> np.ndarray:
    """Outputs (N, size) that bend along the run, more at its beginning."""
    rng = np.random.default_rng(seed)
    place = np.linspace(0, 1, num_steps)[:, None]
    waves = [np.exp(-rate * place) * rng.normal(size=size) for rate in (0.3, 2.0, 6.0, 12.0)]
    return sum(waves) + 0.01 * rng.normal(size=(num_steps, size))


def random_walk(num_steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix and gains of outputs (N, 40) that move on by noise."""
    rng = np.random.default_rng(seed)
    outputs = np.cumsum(rng.normal(size=(num_steps, 40)), axis=0)
    return outputs @ outputs.T, -rng.uniform(0.5, 1.5, num_steps) / num_steps


def residual(outputs: np.ndarray, gains: np.ndarray, path: list[int], end: int) -> float:
    """Squared distance of the summed increments to the span of the path's outputs, by numpy's least squares."""
    total = (gains[path[0] : end, None] * outputs[path[0] : end]).sum(0)
    columns = outputs[sorted(set(path))].T
    return float(np.square(total - columns @ np.linalg.lstsq(columns, total, rcond=None)[0]).sum())


@pytest.mark.parametrize("path", [[0, 0, 0], [3, 0, 0], [4, 2, 0]])
def test_segment_costs_are_least_squares_residuals(path):
    outputs, gains = smooth_outputs(9, 1), np.random.default_rng(2).uniform(-0.3, -0.1, 9)
    costs = SegmentCosts(outputs @ outputs.T, gains)(np.array([path]))[0]
    assert np.isinf(costs[: path[0] + 1]).all()
    for end in range(path[0] + 1, 10):
        assert costs[end] == pytest.approx(residual(outputs, gains, path, end), rel=1e-4, abs=1e-7)


def test_a_computed_step_costs_nothing_on_its_own():
    outputs = smooth_outputs(6, 3)
    costs = SegmentCosts(outputs @ outputs.T, np.full(6, -0.2))(np.array([[2, 0, 0, 0]]))[0]
    assert costs[3] == pytest.approx(0, abs=1e-9) and costs[5] > 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_with_every_path_kept_it_equals_brute_force(count, weighted, monkeypatch):
    monkeypatch.setattr(paths, "PATHS_KEPT", 10_000)
    outputs, gains = smooth_outputs(8, 4), np.full(8, -0.2)
    weights = np.linspace(3, 1, 8) if weighted else np.ones(8)

    def cost(schedule: tuple[int, ...]) -> float:
        ends = [*schedule[1:], 8]
        recent = [list(schedule[max(0, i - 1) : i + 1])[::-1] for i in range(len(schedule))]
        return sum(weights[e - 1] * residual(outputs, gains, r, e) for r, e in zip(recent, ends, strict=True))

    found = path_schedule(outputs @ outputs.T, gains, count, history_length=2, weights=weights)
    best = min(cost((0, *rest)) for rest in combinations(range(1, 8), count - 1))
    assert found[0] == 0 and len(set(found)) == count and found == sorted(found)
    assert cost(tuple(found)) == pytest.approx(best, rel=1e-3, abs=1e-7)


def test_few_paths_come_close_to_all(monkeypatch):
    outputs, gains = smooth_outputs(20, 5), np.full(20, -0.05)
    few = path_schedule(outputs @ outputs.T, gains, 8, history_length=4)
    monkeypatch.setattr(paths, "PATHS_KEPT", 2_000)
    all_of_them = path_schedule(outputs @ outputs.T, gains, 8, history_length=4)
    assert np.abs(np.array(few) - np.array(all_of_them)).max() <= 2


def test_weights_draw_computed_steps_to_where_errors_grow():
    outputs, gains = smooth_outputs(20, 6), np.full(20, -0.05)
    even = path_schedule(outputs @ outputs.T, gains, 6, 3)
    late = path_schedule(outputs @ outputs.T, gains, 6, 3, weights=np.geomspace(1, 1e6, 20))
    assert sum(late) > sum(even)


def test_all_steps_and_impossible_numbers():
    outputs = smooth_outputs(5, 7)
    assert path_schedule(outputs @ outputs.T, np.ones(5), 5, 4) == [0, 1, 2, 3, 4]
    with pytest.raises(CalibrationError, match="between 1 and 5"):
        path_schedule(outputs @ outputs.T, np.ones(5), 6, 4)


def test_identical_outputs_and_steps_of_no_length_are_survived():
    assert len(path_schedule(np.ones((6, 6)), np.zeros(6), 3, 4)) == 3


# (N, K, L) -> what a search that solves for every segment on its own and sorts all extensions chooses
CHOSEN = {
    (12, 3, 1): [0, 3, 7],
    (12, 5, 3): [0, 2, 4, 6, 9],
    (28, 9, 3): [0, 1, 3, 6, 10, 13, 17, 20, 24],
    (28, 14, 4): [0, 2, 3, 5, 6, 8, 10, 12, 14, 15, 17, 19, 21, 24],
    (50, 10, 4): [0, 2, 6, 10, 15, 19, 26, 31, 39, 45],
    (50, 25, 3): [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29, 31, 33, 35, 36, 38, 40, 42, 45, 47],
}


@pytest.mark.parametrize("block", [1, 500, paths.BLOCK])
@pytest.mark.parametrize("setting", list(CHOSEN))
def test_blocks_and_repeated_paths_change_no_schedule(setting, block, monkeypatch):
    monkeypatch.setattr(paths, "BLOCK", block)
    num_steps, count, length = setting
    gram, gains = random_walk(num_steps, num_steps + count)
    assert path_schedule(gram, gains, count, length, np.geomspace(4, 1, num_steps)) == CHOSEN[setting]


def test_costs_of_a_range_are_those_of_all():
    gram, gains = random_walk(20, 0)
    costs, some = SegmentCosts(gram, gains), np.array([[5, 3, 0], [9, 8, 1], [0, 0, 0]])
    assert np.allclose(costs(some, ends=(7, 12)), costs(some)[:, 7:12], rtol=1e-9)
    assert costs(some).shape == (3, 21)


def test_hundreds_of_steps_take_seconds_and_little_memory():
    gram, gains = random_walk(400, 0)
    start = time.process_time()
    assert len(path_schedule(gram, gains, 200, 4)) == 200
    assert time.process_time() - start < 8  # 0.8 where this was written
    gram, gains = random_walk(200, 0)
    tracemalloc.start()
    path_schedule(gram, gains, 100, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20
