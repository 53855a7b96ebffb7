"""The schedule whose segments are best spanned: its costs by hand, its search against brute force."""

import time
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from toys import ToyPipeline, curved

from compare.recorded import recorded_runs
from ertacache.errors import CalibrationError
from ertacache.fit import schedule
from ertacache.fit.record import gram_matrix
from ertacache.fit.schedule import SegmentCosts, choose_steps, error_weights, path_schedule
from ertacache.fit.step_by_step import OUTPUTS

pytestmark = pytest.mark.core


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
    """What a segment costs, as least squares: the ridge is L rows more, which pull towards plain reuse."""
    total = (gains[path[0] : end, None] * outputs[path[0] : end]).sum(0)
    columns, sizes = outputs[path].T, np.linalg.norm(outputs[path], axis=1)
    pull = np.sqrt(schedule.RIDGE) * np.diag(sizes)
    wanted = pull[:, 0] * gains[path[0] : end].sum()
    matrix, target = np.vstack([columns, pull]), np.concatenate([total, wanted])
    return float(np.square(target - matrix @ np.linalg.lstsq(matrix, target, rcond=None)[0]).sum())


@pytest.mark.parametrize("path", [[0, 0, 0], [3, 0, 0], [4, 2, 0], [5, 4, 3]])
def test_segment_costs_are_least_squares_residuals(path):
    outputs, gains = smooth_outputs(9, 1), np.random.default_rng(2).uniform(-0.3, -0.1, 9)
    costs = SegmentCosts(outputs @ outputs.T, gains)(np.array([path]))[0]
    assert np.isinf(costs[: path[0] + 1]).all()
    for end in range(path[0] + 1, 10):
        assert costs[end] == pytest.approx(residual(outputs, gains, path, end), rel=1e-6, abs=1e-12)


def test_a_computed_step_costs_nothing_on_its_own():
    outputs = smooth_outputs(6, 3)
    costs = SegmentCosts(outputs @ outputs.T, np.full(6, -0.2))(np.array([[2, 0, 0, 0]]))[0]
    assert costs[3] == pytest.approx(0, abs=1e-9) and costs[5] > 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_with_every_path_kept_it_equals_brute_force(count, weighted, monkeypatch):
    monkeypatch.setattr(schedule, "PATHS_KEPT", 10_000)
    outputs, gains = smooth_outputs(8, 4), np.full(8, -0.2)
    weights = np.linspace(3, 1, 8) if weighted else np.ones(8)

    def cost(steps: tuple[int, ...]) -> float:
        ends = [*steps[1:], 8]
        recent = [[steps[i], steps[max(0, i - 1)]] for i in range(len(steps))]
        return sum(weights[e - 1] * residual(outputs, gains, r, e) for r, e in zip(recent, ends, strict=True))

    found = path_schedule(outputs @ outputs.T, gains, count, history_length=2, weights=weights)
    best = min(cost((0, *rest)) for rest in combinations(range(1, 8), count - 1))
    assert found[0] == 0 and len(set(found)) == count and found == sorted(found)
    assert cost(tuple(found)) == pytest.approx(best, rel=1e-3, abs=1e-7)


def test_few_paths_come_close_to_all(monkeypatch):
    outputs, gains = smooth_outputs(20, 5), np.full(20, -0.05)
    few = path_schedule(outputs @ outputs.T, gains, 8, history_length=4)
    monkeypatch.setattr(schedule, "PATHS_KEPT", 2_000)
    all_of_them = path_schedule(outputs @ outputs.T, gains, 8, history_length=4)
    assert np.abs(np.array(few) - np.array(all_of_them)).max() <= 2


def test_weights_draw_computed_steps_to_where_errors_grow():
    outputs, gains = smooth_outputs(20, 6), np.full(20, -0.05)
    even = path_schedule(outputs @ outputs.T, gains, 6, 3)
    late = path_schedule(outputs @ outputs.T, gains, 6, 3, weights=np.geomspace(1, 1e6, 20))
    assert sum(late) > sum(even)


def test_weights_by_hand():
    """exp(b (1 - k / N)^2 - 1), and 1 at the last step."""
    wanted = [np.exp(3 - 1), np.exp(3 * 0.75**2 - 1), np.exp(3 * 0.5**2 - 1), 1.0]
    assert error_weights(4) == pytest.approx(np.array(wanted))


@pytest.fixture(scope="module")
def record():
    return recorded_runs(ToyPipeline(curved), ["a", "b", "c"], seeds=range(3), num_inference_steps=20).record


def test_steps_are_chosen_on_the_recorded_outputs_with_early_errors_weighing_more(record):
    gram, gains, weights = gram_matrix(record.outputs), np.asarray(record.gains), error_weights(20)
    assert choose_steps(record, 6) == path_schedule(gram, gains, 6, OUTPUTS, weights)
    assert weights[0] > 5 * weights[10] > 5 * weights[-2] and weights[-1] == 1


def test_the_more_early_errors_weigh_the_earlier_are_the_computed_steps(record, monkeypatch):
    sums = []
    for early in (0.0, 3.0, 30.0):
        monkeypatch.setattr(schedule, "EARLY", early)
        sums.append(sum(choose_steps(record, 6)))
    assert sums[0] > sums[1] > sums[2]


def test_all_steps_and_impossible_numbers():
    outputs = smooth_outputs(5, 7)
    assert path_schedule(outputs @ outputs.T, np.ones(5), 5, 4) == [0, 1, 2, 3, 4]
    with pytest.raises(CalibrationError, match="between 1 and 5"):
        path_schedule(outputs @ outputs.T, np.ones(5), 6, 4)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_the_size_of_outputs_and_of_weights_changes_no_schedule(size):
    outputs, gains, weights = smooth_outputs(14, 8), np.full(14, -0.1), np.geomspace(4, 1, 14)
    gram = outputs @ outputs.T
    wanted = path_schedule(gram, gains, 5, 4, weights)
    assert (
        path_schedule(gram * size, gains, 5, 4, weights) == path_schedule(gram, gains, 5, 4, weights * size) == wanted
    )


def test_costs_are_those_of_outputs_in_other_units():
    outputs, gains, paths = smooth_outputs(9, 1), np.full(9, -0.1), np.array([[4, 2, 0]])
    costs, small = (SegmentCosts(s * outputs @ outputs.T, gains)(paths)[0, 5:] for s in (1, 1e-6))
    assert small == pytest.approx(1e-6 * costs, rel=1e-4, abs=1e-15)


def test_the_ridge_leaves_what_outputs_span_next_to_free():
    """Of a straight line, which two outputs span, a tenth is left of what plain reuse costs: that is the ridge."""
    line = np.stack([np.ones(10), np.arange(10.0)], axis=1) @ np.random.default_rng(0).normal(size=(2, 30))
    gram, gains = line @ line.T, np.full(10, -0.1)
    two, one = (SegmentCosts(gram, gains)(np.array([path]))[0, 8] for path in ([4, 2], [4, 4]))
    assert two < 0.15 * one


@pytest.mark.filterwarnings("error")
def test_a_silent_output_does_no_harm():
    outputs = smooth_outputs(8, 9)
    outputs[[0, 3]] = 0
    costs = SegmentCosts(outputs @ outputs.T, np.full(8, -0.2))(np.array([[3, 0], [5, 3]]))
    assert not np.isnan(costs).any() and 0 < costs[0, 8] < np.inf
    assert len(path_schedule(outputs @ outputs.T, np.full(8, -0.2), 4, 3)) == 4


def test_identical_outputs_and_steps_of_no_length_are_survived():
    assert len(path_schedule(np.ones((6, 6)), np.zeros(6), 3, 4)) == 3


def slow_search(outputs: np.ndarray, gains: np.ndarray, count: int, length: int, weights: np.ndarray) -> list[int]:
    """The same search, which solves for every segment on its own and sorts all extensions of a step."""
    num_steps = len(outputs)

    def cost(steps: tuple[int, ...], end: int) -> float:
        recent = [*steps[::-1], *[steps[0]] * length][:length]
        return weights[end - 1] * residual(outputs, gains, recent, end)

    found = [(0.0, (0,))]
    for k in range(1, count):
        extended: dict[int, list] = {}
        for total, steps in found:
            for step in range(max(steps[-1] + 1, k), num_steps - (count - k) + 1):
                extended.setdefault(step, []).append((total + cost(steps, step), (*steps, step)))
        found = [best for several in extended.values() for best in sorted(several)[: schedule.PATHS_KEPT]]
    return list(min((total + cost(steps, num_steps), steps) for total, steps in found)[1])


@pytest.mark.parametrize("setting", [(12, 3, 1), (12, 5, 3), (20, 8, 4)])
def test_it_equals_a_search_that_solves_for_every_segment(setting):
    num_steps, count, length = setting
    outputs, weights = smooth_outputs(num_steps, count), np.geomspace(4, 1, num_steps)
    gains = -np.random.default_rng(0).uniform(0.5, 1.5, num_steps) / num_steps
    wanted = slow_search(outputs, gains, count, length, weights)
    assert path_schedule(outputs @ outputs.T, gains, count, length, weights) == wanted


def test_hundreds_of_steps_take_seconds_and_little_memory():
    gram, gains = random_walk(200, 0)
    start = time.process_time()
    assert len(path_schedule(gram, gains, 100, 6)) == 100
    assert time.process_time() - start < 8  # 1.5 on one core of a desktop
    tracemalloc.start()
    path_schedule(*random_walk(100, 0), 50, 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
