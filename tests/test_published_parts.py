"""The bench that takes the published method apart, and the table that it puts into docs/method.md."""

from dataclasses import replace

import published_parts
import pytest
from test_attach import run
from toys import ToyPipeline, curved

import ertacache


@pytest.fixture(scope="module")
def made():
    """The published method on a pipeline that is a formula, half of the steps computed."""
    return ertacache.calibrate(
        ToyPipeline(curved), ["a", "b"], seeds=range(2), method="paper", computed_steps=4, num_inference_steps=8
    )


def test_the_page_says_what_was_measured():
    published_parts.main(["--page", "--check"])


def test_each_part_is_taken_out_alone(made):
    parts = {name: take(made) for name, take in published_parts.PARTS.items()}
    assert {part.num_inference_steps for part in parts.values()} == {8}
    assert all(part.computed_steps == made.computed_steps for part in parts.values())
    assert [part.error_model is not None for part in parts.values()] == [False, True, False, True]
    assert [part.adjusted_sigmas is not None for part in parts.values()] == [False, False, True, True]
    results = []
    for part in parts.values():
        pipe = ToyPipeline(curved)
        with ertacache.apply(pipe, part):
            results.append(run(pipe, num_inference_steps=8))
    assert len({float(result.sum()) for result in results}) == 4


def test_what_the_adjustment_does_to_a_grid_by_hand(made):
    given = replace(
        made,
        num_inference_steps=3,
        computed_steps=[0, 2],
        sigmas=[3.0, 2.0, 1.0, 0.0],
        adjusted_sigmas=[3.0, 2.0, 1.95, 0.0],
        step_factors=[1.0, 0.05, 1.0],
    )
    facts = published_parts.grid_facts(given)
    assert (facts["reused_steps"], facts["factors_at_the_minimum"]) == (1, 1)
    assert facts["last_step_stretched"] == pytest.approx(1.95)
