"""Matrices of channels: their sum, the copy to the device before the loop, a run with them, and the file."""

import functools
from dataclasses import replace

import pytest
import torch
from toys import ToyPipeline, curved

import ertacache
from ertacache.cache import Coefficients, Row, combine
from ertacache.calibration import Calibration
from ertacache.channels import ChannelMatrices, Layout, StepChannels
from ertacache.errors import CalibrationError, MismatchError

pytestmark = pytest.mark.core
STEPS = 12
CPU = torch.device("cpu")
SHAPES = {-1: (2, 6, 12), -3: (2, 3, 4, 6), -4: (2, 3, 5, 4, 6)}  # by the axis of the channels
SUMS = {-1: "cd,btcp->btdp", -3: "cd,bchw->bdhw", -4: "cd,bcfhw->bdfhw"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(axis: int, matrix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """M^T o, channel by channel; the four values of a channel in a packed token are turned alike."""
    packed = axis == -1
    made = torch.einsum(SUMS[axis], matrix, output.unflatten(-1, (-1, 4)) if packed else output)
    return made.flatten(-2) if packed else made


def combined(outputs, shares, matrices, axis, latents=None, b=0.0) -> torch.Tensor:
    row = Row(shares, b, StepChannels(matrices, Layout(axis)))
    return combine(outputs, row, outputs[0] if latents is None else latents)


# -- the sum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", list(SHAPES))
def test_channels_of_the_outputs_and_the_latents_are_added_to_the_shared_sum(axis):
    outputs, latents = [random(*SHAPES[axis], seed=i) for i in range(2)], random(*SHAPES[axis], seed=9)
    matrices = random(2, 3, 3, seed=5)
    before = [output.clone() for output in outputs]
    made = combined(outputs, [0.5, 0.25], matrices, axis, latents, 0.1)
    wanted = 0.5 * outputs[0] + 0.25 * outputs[1] + 0.1 * latents
    wanted = wanted + turned(axis, matrices[0], outputs[0]) + turned(axis, matrices[1], outputs[1])
    torch.testing.assert_close(made, wanted)
    assert all(torch.equal(one, other) for one, other in zip(outputs, before, strict=True))


@pytest.mark.parametrize(("shares", "count"), [([0.5], 2), ([0.5, 0.25], 1)])
def test_a_step_may_have_more_matrices_than_shares_or_fewer(shares, count):
    outputs, matrices = [random(*SHAPES[-3], seed=i) for i in range(2)], random(count, 3, 3)
    wanted = sum(share * output for share, output in zip(shares, outputs, strict=False))
    wanted = wanted + sum(turned(-3, m, o) for m, o in zip(matrices, outputs, strict=False))
    torch.testing.assert_close(combined(outputs, shares, matrices, -3), wanted)


@pytest.mark.parametrize("axis", list(SHAPES))
def test_outputs_that_are_not_there_yet_are_left_out(axis):
    output, matrices = random(*SHAPES[axis]), random(2, 3, 3)
    wanted = 0.5 * output + turned(axis, matrices[0], output)
    torch.testing.assert_close(combined([output], [0.5, 0.25], matrices, axis), wanted)


def test_channels_that_only_the_output_has_keep_the_shared_coefficients():
    """As the variances of a bare model whose pipeline drops them."""
    output = random(1, 6, 4, 4)
    made = combined([output], [1.0], 0.5 * torch.eye(3)[None], -3)
    torch.testing.assert_close(made[:, :3], 1.5 * output[:, :3])
    assert torch.equal(made[:, 3:], output[:, 3:])


@pytest.mark.parametrize("axis", list(SHAPES))
def test_half_precision_is_summed_in_single(axis):
    outputs, matrices = [random(*SHAPES[axis], seed=i).bfloat16() for i in range(2)], random(2, 3, 3)
    made = combined(outputs, [1.0, -0.5], matrices, axis)
    exact = combined([o.float() for o in outputs], [1.0, -0.5], matrices, axis)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, exact.bfloat16())


@pytest.mark.parametrize("axis", list(SHAPES))
def test_sums_in_any_order_of_memory(axis):
    outputs, matrices = [random(*SHAPES[axis], seed=i) for i in range(2)], random(2, 3, 3)
    wanted = combined(outputs, [0.5, 0.25], matrices, axis)
    strange = [output.transpose(0, 1).contiguous().transpose(0, 1) for output in outputs]
    assert not strange[0].is_contiguous()
    torch.testing.assert_close(combined(strange, [0.5, 0.25], matrices, axis), wanted)


def test_latents_without_a_batch():
    output, matrices = random(3, 4, 6), random(1, 3, 3)
    wanted = 0.5 * output + torch.einsum("cd,chw->dhw", matrices[0], output)
    torch.testing.assert_close(combined([output], [0.5], matrices, -3), wanted)


# -- on the device -----------------------------------------------------------------------------------------


def test_every_step_has_its_own_matrices_or_none():
    steps = [[], [[[1, 2], [3, 4]]], [[[5.0, 6.0], [7.0, 8.0]], [[9.0, 10.0], [11.0, 12.0]]]]
    none, *placed = Coefficients([[1.0]] * 3, [0.0] * 3, ChannelMatrices(Layout(-3), steps)).rows(CPU)
    assert none == Row([1.0])
    for row, step in zip(placed, steps[1:], strict=True):
        assert row.channels.matrices.tolist() == step and row.channels.matrices.dtype == torch.float32


@pytest.mark.parametrize("kind", [int, float])
def test_matrices_are_float32_whatever_the_file_writes(kind):
    whole = [[[[kind(row == column) for column in range(3)] for row in range(3)]]]
    (placed,) = ChannelMatrices(Layout(-3), whole).on(CPU)
    output = random(1, 3, 2, 2)
    torch.testing.assert_close(combine([output], Row([1.0], 0.0, placed), output), 2 * output)


def with_channels(pipe) -> Calibration:
    """A calibration of a toy pipeline with matrices that nobody fitted; step 0 has none."""
    made = ertacache.calibrate(
        pipe, ["p", "q"], seeds=(0, 1), computed_steps=5, num_inference_steps=STEPS, progress=False
    )
    counts = [len(row) for row in made.coefficients]
    steps = [(0.1 * random(count, 3, 3, seed=step)).tolist() for step, count in enumerate(counts)]
    return replace(made, channel_coefficients=[[], *steps[1:]], channel_axis=-3)


def run(pipe, latents=None):
    generator = torch.Generator().manual_seed(7)
    return pipe("p", generator=generator, num_inference_steps=STEPS, output_type="latent", latents=latents)[0]


def test_a_run_is_the_loop_of_the_method():
    """Written out: the same combination at every step, around the same model and scheduler."""
    pipe = ToyPipeline(curved)
    made, start = with_channels(pipe), random(1, 3, 4, 4, seed=3)
    with ertacache.apply(pipe, made):
        cached = run(pipe, start)
    plain, x, history = ToyPipeline(curved), start, []
    plain.scheduler.set_timesteps(STEPS)
    for i, t in enumerate(plain.scheduler.timesteps):
        if i in made.computed_steps:
            history.insert(0, plain.transformer(x, t.expand(1))[0])
        v = sum(a * o for a, o in zip(made.coefficients[i], history, strict=False))
        for matrix, output in zip(made.channel_coefficients[i], history, strict=False):
            v = v + turned(-3, torch.tensor(matrix), output)
        x = plain.scheduler.step(v, t, x, return_dict=False)[0]
    torch.testing.assert_close(cached, x)
    assert not torch.allclose(cached, run(plain, start), atol=1e-3)


def test_nothing_is_copied_to_the_device_inside_the_loop(monkeypatch):
    pipe = ToyPipeline(curved)
    made, seen = with_channels(pipe), []
    copied, step = ChannelMatrices.on, pipe.scheduler.step
    monkeypatch.setattr(ChannelMatrices, "on", lambda *given: seen.append("copied") or copied(*given))
    counted = functools.wraps(step)(lambda *a, **k: seen.append("step") or step(*a, **k))
    monkeypatch.setattr(pipe.scheduler, "step", counted)
    with ertacache.apply(pipe, made):
        run(pipe)
    assert seen == ["copied", *["step"] * STEPS]


# -- the file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Calibration:
    return with_channels(ToyPipeline(curved))


def test_the_file_keeps_them(made, tmp_path):
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
def test_damaged_files_are_refused(made, name):
    data = made.to_dict()
    with pytest.raises(CalibrationError, match=r"'channel_(coefficients|axis)'"):
        Calibration.from_dict({**data, **WRONG[name](data)})


def test_latents_with_other_channels_are_refused(made):
    odd = replace(made, latent_shape=[2, 4, 4], channel_coefficients=[[]] * STEPS)
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, odd), pytest.raises(MismatchError, match="2 channels of"):
        run(pipe)
