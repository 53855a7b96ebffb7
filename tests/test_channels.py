"""Coefficients of channels: the sum, the fit, the file, and what they bring on data they are made for."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_attach import run
from toys import ToyPipeline

import ertacache
from ertacache import channels
from ertacache.calibration import Calibration
from ertacache.channels import ChannelMatrices, Layout, PlacedMatrices, layout_of, placed
from ertacache.errors import CalibrationError, MismatchError
from ertacache.fit.channels import fit_channels
from ertacache.fit.runs import recorded_runs
from ertacache.fit.step_by_step import Fitter, Form
from ertacache.rectification import Coefficients, combine

STEPS, SCHEDULE = 12, [0, 1, 3, 6, 9]
PROMPTS = [f"prompt {i}" for i in range(6)]
# of the directions, on the left and on the right: six of them, more than outputs that are combined
POWERS = torch.tensor([4.0, 1.0, 0.05]).view(3, 1, 1) * torch.tensor([1.0, 1.0, 0.3, 0.3])
TURN = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q  # of channels to directions
SHAPES = {-1: (2, 6, 12), -3: (2, 3, 4, 6), -4: (2, 3, 5, 4, 6)}


def gaussian(latents, sigma):
    """The velocity of Gaussian data whose directions in channel space have powers of their own, on each half one."""
    turned = torch.einsum("dc,nchw->ndhw", TURN, latents)
    velocity = turned * (sigma - (1 - sigma) * POWERS) / (sigma**2 + (1 - sigma) ** 2 * POWERS)
    return torch.einsum("dc,ndhw->nchw", TURN, velocity)


def calibrate(pipe=None, **kwargs):
    made_of = {"num_inference_steps": STEPS, "seeds": range(6), "progress": False, "computed_steps": 5}
    kwargs = {**made_of, "search_budget": 1, **kwargs}
    return ertacache.calibrate(pipe or ToyPipeline(gaussian), PROMPTS, **kwargs)


# -- the sum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "in_channels", "axis"),
    [
        ((1, 4096, 64), 64, -1),
        ((1, 4, 8, 8), 4, -3),
        ((1, 16, 21, 60, 104), 16, -4),
        ((1, 13, 16, 60, 90), 16, -3),  # CogVideoX: frames first
        ((1, 4, 15, 60, 106), None, -4),
    ],
)
def test_the_channels_of_the_four_models_are_found(shape, in_channels, axis):
    assert layout_of(shape, in_channels) == Layout(axis)


@pytest.mark.parametrize("shape", [(1, 8), (1, 10, 5), (1, 1000, 4, 4), (1, 2, 3, 4, 5, 6)])
def test_other_latents_have_shared_coefficients(shape):
    assert layout_of(shape, None) is None


@pytest.mark.parametrize("axis", list(SHAPES))
def test_channels_of_the_outputs_are_added_to_those_of_the_sum(axis):
    layout, rng = Layout(axis), torch.Generator().manual_seed(0)
    outputs = [torch.randn(SHAPES[axis], generator=rng) for _ in range(2)]
    terms = torch.randn(2, 3, 3, generator=rng)
    made = combine(outputs, [0.5, 0.25], matrices=placed(terms.tolist(), layout, torch.device("cpu")))
    wanted = sum(
        layout.rows(output) @ (share * torch.eye(3) + matrix)
        for share, output, matrix in zip((0.5, 0.25), outputs, terms, strict=True)
    )
    torch.testing.assert_close(layout.rows(made), wanted)


def test_channels_that_only_the_output_has_keep_the_shared_coefficients():
    """As the variances of a bare model whose pipeline drops them."""
    output = torch.randn(1, 6, 4, 4)
    half = 0.5 * torch.eye(3)
    made = combine([output], [1.0], matrices=PlacedMatrices(half[None], Layout(-3)))
    torch.testing.assert_close(made[:, :3], 1.5 * output[:, :3])
    assert torch.equal(made[:, 3:], output[:, 3:])


@pytest.mark.parametrize("axis", list(SHAPES))
def test_half_precision_is_summed_in_single(axis):
    layout, rng = Layout(axis), torch.Generator().manual_seed(0)
    outputs = [torch.randn(SHAPES[axis], generator=rng).bfloat16() for _ in range(2)]
    matrices = placed(torch.randn(2, 3, 3, generator=rng).tolist(), layout, torch.device("cpu"))
    made = combine(outputs, [1.0, -0.5], matrices=matrices)
    exact = combine([o.float() for o in outputs], [1.0, -0.5], matrices=matrices)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, exact.bfloat16())


@pytest.mark.parametrize("axis", list(SHAPES))
def test_sums_in_any_order_of_memory(axis):
    layout, rng = Layout(axis), torch.Generator().manual_seed(0)
    outputs = [torch.randn(SHAPES[axis], generator=rng) for _ in range(2)]
    matrices = placed(torch.randn(2, 3, 3, generator=rng).tolist(), layout, torch.device("cpu"))
    wanted = combine(outputs, [0.5, 0.25], matrices=matrices)
    turned = [output.transpose(0, 1).contiguous().transpose(0, 1) for output in outputs]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(combine(turned, [0.5, 0.25], matrices=matrices), wanted)


def test_latents_without_a_batch():
    output, terms = torch.randn(3, 4, 6), torch.randn(1, 3, 3)
    made = combine([output], [0.5], matrices=PlacedMatrices(terms, Layout(-3)))
    torch.testing.assert_close(made, 0.5 * output + torch.einsum("cd,chw->dhw", terms[0], output))


@pytest.mark.parametrize("rows", [[[1.0], [0.5, 2.0]], [[1.0], [0.5]]])  # the second: another number of outputs
def test_small_matrices_of_tokens_hold_the_shared_coefficients(monkeypatch, rows):
    rng = torch.Generator().manual_seed(0)
    steps, outputs = [[], torch.randn(2, 3, 3, generator=rng).tolist()], list(torch.randn(2, 2, 6, 12, generator=rng))
    given = rows, [0.0, 0.0], ChannelMatrices(Layout(-1), steps)
    made_anew = combine(outputs, rows[1], matrices=placed(steps[1], Layout(-1), outputs[0].device))
    kept = Coefficients(*given)
    *_, matrices = kept.at(1, outputs[0])
    assert (matrices.of_tokens is not None) == (len(rows[1]) == 2)
    torch.testing.assert_close(combine(outputs, *kept.at(1, outputs[0])), made_anew)
    torch.testing.assert_close(
        combine(outputs[:1], *kept.at(1, outputs[0])),
        combine(outputs[:1], rows[1], None, 0, placed(steps[1], Layout(-1), outputs[0].device)),
    )
    # other coefficients beside the same matrices
    other = kept.changed([(1, 0)], [1.0])
    torch.testing.assert_close(combine(outputs, *other.at(1, outputs[0])), made_anew + outputs[0])
    monkeypatch.setattr(channels, "KEPT_BYTES", 2 * 4 * 9 * 16 - 1)
    *_, matrices = Coefficients(*given).at(1, outputs[0])
    assert matrices.of_tokens is None


def test_nothing_is_copied_to_the_device_inside_the_loop(monkeypatch):
    pipe, made = ToyPipeline(gaussian), calibrate()
    seen = []
    copied, step = ChannelMatrices._copied, pipe.scheduler.step
    monkeypatch.setattr(ChannelMatrices, "_copied", lambda *given: seen.append("copied") or copied(*given))
    counted = functools.wraps(step)(lambda *a, **k: seen.append("step") or step(*a, **k))
    monkeypatch.setattr(pipe.scheduler, "step", counted)
    with ertacache.apply(pipe, made):
        run(pipe, STEPS)
    assert seen == ["copied", *["step"] * STEPS]


# -- the fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", list(SHAPES))
def test_the_fit_finds_the_coefficients_of_channels(axis):
    layout, rng = Layout(axis), torch.Generator().manual_seed(0)
    shape = (4, *SHAPES[axis][1:])
    columns = [torch.randn(shape, generator=rng) for _ in range(2)]
    true = 0.2 * torch.randn(2, 3, 3, generator=rng)
    target = combine(columns, [1.0, -0.5], matrices=placed(true.tolist(), layout, torch.device("cpu")))
    found = fit_channels(columns, target, [1.0, -0.5], layout)
    assert found == pytest.approx(true.numpy(), abs=2e-2)
    assert np.array_equal(found, np.round(found, 5))


def test_terms_serve_every_step_and_none_where_there_are_none():
    steps = [[], [[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]], [[9.0, 10.0], [11.0, 12.0]]]]
    terms = ChannelMatrices(Layout(-3), steps)
    assert terms.on(torch.device("cpu"))[0] is None
    for step in (1, 2):
        assert terms.on(torch.device("cpu"))[step].matrices.tolist() == steps[step]
    coefficients = Coefficients([[1.0]] * 3, [0.0] * 3, terms)
    assert coefficients.plain(0) and not coefficients.plain(1)


def test_gaussian_data_is_predicted_far_better_than_with_shared_coefficients():
    runs = recorded_runs(ToyPipeline(gaussian), PROMPTS, seeds=range(6), num_inference_steps=STEPS)
    shared, grouped = (
        runs.final_error(Fitter(SCHEDULE, runs.recorded.latents, form=Form(3, layout)))
        for layout in (None, runs.layout)
    )
    assert grouped < shared - 3  # decades of the squared error: 30 dB


def test_unseen_prompts_and_the_prediction_gain_too():
    pipe = ToyPipeline(gaussian)
    made = calibrate(pipe)
    reference = run(pipe, STEPS, prompts=tuple("abcd"))
    with ertacache.apply(pipe, made):
        error = (run(pipe, STEPS, prompts=tuple("abcd")) - reference).square().mean()
    shared = replace(made, channel_coefficients=None, channel_axis=None)
    with ertacache.apply(pipe, shared):
        without = (run(pipe, STEPS, prompts=tuple("abcd")) - reference).square().mean()
    assert error < 0.01 * without
    assert made.predicted["psnr"] > 50


def test_given_steps_are_taken_as_they_are():
    runs = recorded_runs(ToyPipeline(gaussian), PROMPTS, seeds=range(6), num_inference_steps=STEPS)
    first = Fitter(SCHEDULE, runs.recorded.latents, form=Form(3, runs.layout))
    runs.run(first)
    moved = first.fitted().changed([(4, 0)], [0.01])
    last = Fitter(SCHEDULE, runs.recorded.latents, form=Form(3, runs.layout), given=moved, start=STEPS - 1)
    runs.run(last)
    made = last.fitted()
    assert made.outputs[:-1] == moved.outputs[:-1] and made.matrices.steps[:-1] == moved.matrices.steps[:-1]
    assert made.outputs[-1] != moved.outputs[-1]


# -- the file ----------------------------------------------------------------------------------------------


def test_the_file_keeps_them(tmp_path):
    made = calibrate()
    assert made.channel_axis == -3 and made.channel_coefficients[0] == []
    assert Calibration.load(made.save(tmp_path / "c.json")) == made


WRONG = {
    "a step too few": lambda c: {"channel_coefficients": c["channel_coefficients"][1:]},
    "no output": lambda c: {"channel_coefficients": [c["channel_coefficients"][1][0]] * STEPS},
    "text": lambda c: {"channel_coefficients": [[], *[[["no"]]] * (STEPS - 1)]},
    "no list": lambda c: {"channel_coefficients": 3},
    "no axis": lambda c: {"channel_axis": None},
    "another axis": lambda c: {"channel_axis": -2},
    "an axis that the latents lack": lambda c: {"channel_axis": -4},
    "an axis alone": lambda c: {"channel_coefficients": None},
    "other channels": lambda c: {"latent_shape": [5, 4, 4]},
    "of the published method": lambda c: {"method": "paper", "coefficients": None},
}


@pytest.mark.parametrize("name", list(WRONG))
def test_damaged_files_are_refused(name):
    data = calibrate().to_dict()
    with pytest.raises(CalibrationError, match=r"'channel_(coefficients|axis)'"):
        Calibration.from_dict({**data, **WRONG[name](data)})


def test_latents_with_other_channels_are_refused():
    made = calibrate()
    odd = replace(made, latent_shape=[2, 4, 4], channel_coefficients=[[]] * STEPS)
    pipe = ToyPipeline(gaussian)
    with ertacache.apply(pipe, odd), pytest.raises(MismatchError, match="2 channels of"):
        run(pipe, STEPS)
