"""The embedded pipelines beside the published ratios of their real models."""

from typing import Any

import pytest
import realism
from diffusers import FlowMatchEulerDiscreteScheduler
from toys import ToyPipeline, curved


def test_there_is_a_ratio_for_every_step_but_the_first():
    for name, steps in (("flux", 28), ("wan", 50), ("opensora", 30)):
        assert len(realism.REAL[name].ratios) == steps - 1 and realism.REAL[name].source != "none found"
    assert realism.REAL["wan"].ratios[0] == pytest.approx((1.0124 + 1.02213) / 2)
    assert realism.published([1.0] * 5, ()) == {}


def test_like_ratios_correlate_and_have_the_same_product():
    known = list(realism.REAL["flux"].ratios)
    found = realism.published(known, known)
    assert found["correlation"] == pytest.approx(1) and found["product"] == pytest.approx(1.86, abs=0.01)
    assert realism.published([2 - ratio for ratio in known], known)["correlation"] == pytest.approx(-1)


def test_the_table_has_the_ratio_of_each_step():
    ratios = [1 + step / 100 for step in range(2, 29)]
    rows: list[dict[str, Any]] = [
        {
            "model": "FLUX tiny",
            "embedded": {"ratios": ratios, "product": 1.9},
            "published": {"ratios": [], "source": "none found"},
        }
    ]
    lines = realism.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    found = dict(zip(cells[0], cells[2], strict=True))
    assert found["3"] == "1.030" and found["25"] == "1.250" and found["last"] == "1.280" and "30" not in found
    assert found["product of 10"] == "1.90" and found["correlation"] == "" and "none found" in cells[1]


def test_the_grid_is_that_of_other_sizes():
    pipe = ToyPipeline(curved, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    levels = []
    for mu in (0.5, 1.15):
        with realism.on_real_grid(pipe, {"mu": mu}):
            pipe("x")
        levels.append(float(pipe.scheduler.sigmas[4]))
    assert levels[0] < levels[1] and "set_timesteps" not in vars(pipe.scheduler)
