"""NaN, Inf, overflow, singular systems and the smallest latents: reported with the step, or right."""

import math
from dataclasses import replace

import bare_models
import numpy as np
import pytest
import tiny_models
import torch
from bare_models import official_generate
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import NAMES, NUM_STEPS, call, expected, fitted, make
from toys import ToyPipeline, curved

import ertacache
from ertacache.attach import FiniteCheck
from ertacache.errors import NumericsError
from ertacache.fit.least_squares import RIDGE, fit_combination, solve_towards_plain
from ertacache.fit.record import gram_matrix
from ertacache.fit.schedule import path_schedule


def spoil(pipe, at_call: int, value: float):
    """From its `at_call`-th call on the transformer's output holds one bad value."""
    calls = []

    def hook(_module, _arguments, output):
        calls.append(1)
        if len(calls) <= at_call:
            return output
        bad = output[0].clone()
        bad[(0,) * bad.ndim] = value
        return (bad,)

    return pipe.transformer.register_forward_hook(hook)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_output_is_reported_with_its_step_in_generation(name, value):
    pipe = make(name)
    calls_a_step = 2 if name == "wan" else 1
    with ertacache.apply(pipe, fitted(name)):
        for index, step in enumerate(fitted(name).computed_steps):
            handle = spoil(pipe, index * calls_a_step, value)
            with pytest.raises(NumericsError, match=rf"step {step} \(computed\)"):
                call(pipe, name)
            handle.remove()
            assert torch.equal(call(pipe, name), expected(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_output_is_reported_with_its_step_in_calibration(name):
    pipe = make(name)
    calls_a_step = 2 if name == "wan" else 1
    for step in (0, NUM_STEPS // 2, NUM_STEPS - 1):
        handle = spoil(pipe, step * calls_a_step, math.nan)
        with pytest.raises(NumericsError, match=f"step {step} "):
            tiny_models.calibrate(pipe, name)
        handle.remove()
    assert "_ertacache" not in vars(pipe)
    assert tiny_models.calibrate(pipe, name) == fitted(name)


def test_nothing_is_read_from_the_device_before_the_last_step(monkeypatch):
    """Checked on the one place where it is: sums are kept, and turned into numbers once a run."""
    pipe = make("wan")
    reads, steps = [], []
    original = torch.Tensor.tolist
    with ertacache.apply(pipe, fitted("wan")), monkeypatch.context() as patch:
        step_of = lambda _p, step, _t, state: (steps.append(step), state)[1]  # noqa: E731
        patch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(len(steps)), original(self))[1])
        call(pipe, "wan", callback_on_step_end=step_of)
    assert [at for at in reads if at > 0] == [NUM_STEPS - 1]  # the callback comes after the step


@pytest.fixture(scope="module")
def for_bare() -> ertacache.Calibration:
    asked = {"computed_steps": 5, "num_inference_steps": bare_models.STEPS, "progress": False}
    return ertacache.calibrate(bare_models.Pipeline(), ["a", "b", "c"], seeds=range(3), **asked)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("branch", [0, 1])
def test_a_bad_output_of_a_transformer_alone_is_reported_at_the_end(for_bare, branch, value):
    model = bare_models.WanModel()
    with ertacache.apply(model, for_bare, converted=True) as applied:
        expected = official_generate(model, "x")
        for index, step in enumerate(for_bare.computed_steps):
            calls: list[int] = []

            def spoiling(_m, _a, output, calls=calls, index=index):
                calls.append(1)
                return [output[0] + value] if len(calls) == 2 * index + branch + 1 else output

            handle, before = model.register_forward_hook(spoiling), applied.computed_calls + applied.reused_calls
            with pytest.raises(NumericsError, match=rf"step {step} \(computed\)"):
                official_generate(model, "x")
            assert applied.computed_calls + applied.reused_calls - before == 2 * bare_models.STEPS
            handle.remove()
            assert torch.equal(official_generate(model, "x"), expected)


def test_a_run_of_a_transformer_alone_is_read_once_and_a_given_up_one_not_at_all(for_bare, monkeypatch):
    model = bare_models.WanModel()
    with ertacache.apply(model, for_bare, converted=True) as applied, monkeypatch.context() as patch:
        reads: list[int] = []
        original = FiniteCheck.verify  # the one place where anything is read

        def verify(self, was_computed):
            reads.append(applied.computed_calls + applied.reused_calls)
            original(self, was_computed)

        patch.setattr(FiniteCheck, "verify", verify)
        handle = model.register_forward_hook(lambda _m, _a, output: [output[0] * math.nan])
        with pytest.raises(KeyboardInterrupt):
            official_generate(model, "x", stop_at=(4, "uncond"))
        handle.remove()
        before = applied.computed_calls + applied.reused_calls
        official_generate(model, "x")
    assert reads == [before + 2 * bare_models.STEPS]


def test_the_check_of_a_transformer_alone_can_be_left_out(for_bare):
    model = bare_models.WanModel()
    model.register_forward_hook(lambda _m, _a, output: [output[0] * math.nan])
    with ertacache.apply(model, for_bare, converted=True, check_finite=False):
        assert official_generate(model, "x").isnan().all()


def test_the_check_can_be_left_out():
    pipe = make("flux")
    handle = spoil(pipe, 0, math.nan)
    with ertacache.apply(pipe, fitted("flux"), check_finite=False):
        assert call(pipe, "flux").isnan().any()
    handle.remove()


def test_coefficients_that_overflow_are_reported_at_the_reused_step():
    pipe = make("flux")
    wild = [[1.0] if i == 0 else [1e29] for i in range(NUM_STEPS)]
    with (
        ertacache.apply(pipe, replace(fitted("flux"), coefficients=wild)),
        pytest.raises(NumericsError, match=r"step \d"),
    ):
        call(pipe, "flux")


@pytest.mark.parametrize("computed", [1, NUM_STEPS - 1, NUM_STEPS])
@pytest.mark.parametrize("name", NAMES)
def test_the_fewest_and_the_most_computed_steps(name, computed):
    pipe = make(name)
    made = tiny_models.calibrate(pipe, name, computed_steps=computed)
    assert len(made.computed_steps) == computed
    with ertacache.apply(pipe, made):
        result = call(pipe, name)
    assert result.isfinite().all()
    if computed == NUM_STEPS:
        assert torch.equal(result, expected(name)[0])


@pytest.mark.parametrize("method", ["ertacache", "paper"])
def test_one_step_runs(method):
    made = ertacache.calibrate(
        ToyPipeline(curved), ["p", "q"], computed_steps=1, num_inference_steps=1, method=method, progress=False
    )
    assert made.computed_steps == [0]


def test_identical_outputs_make_a_singular_system_that_is_solved():
    """A constant velocity: every cached output is the same, the Gram matrix has rank one."""
    pipe = ToyPipeline(lambda x, _: torch.ones_like(x))
    made = ertacache.calibrate(pipe, ["p", "q"], seeds=(0, 1), computed_steps=4, num_inference_steps=8, progress=False)
    assert np.isfinite(np.concatenate([np.asarray(row) for row in made.coefficients])).all()
    reference = pipe(["a"], generator=torch.Generator().manual_seed(5), num_inference_steps=8, output_type="latent")[0]
    with ertacache.apply(pipe, made):
        cached = pipe(["a"], generator=torch.Generator().manual_seed(5), num_inference_steps=8, output_type="latent")[0]
    torch.testing.assert_close(cached, reference, rtol=1e-4, atol=1e-4)


class StandingStill(FlowMatchEulerDiscreteScheduler):
    """Repeats a sigma, so that a step has length zero: its output leads nowhere else than any other."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas[5] = self.sigmas[4]


@pytest.mark.parametrize("computed", [2, 5])
def test_a_step_of_length_zero_is_left_as_it_is(computed):
    pipe = ToyPipeline(curved, scheduler=StandingStill(shift=1.0))
    asked = {"computed_steps": computed, "num_inference_steps": 8, "progress": False}
    made = ertacache.calibrate(pipe, ["p", "q"], seeds=(0, 1), **asked)
    assert made.coefficients[4] == [1.0] and made.predicted["psnr"] > 20
    assert np.isfinite(np.concatenate([np.asarray(row) for row in made.coefficients])).all()


def test_a_model_that_says_nothing_is_calibrated():
    pipe = ToyPipeline(lambda x, _: torch.zeros_like(x))
    made = ertacache.calibrate(pipe, "p", computed_steps=3, num_inference_steps=6, progress=False)
    assert all(math.isfinite(a) for row in made.coefficients for a in row)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15])
def test_singular_normal_equations(scale):
    matrix = np.full((3, 3), scale)
    assert np.isfinite(solve_towards_plain(matrix, matrix[:, 0])).all()


def test_one_prompt_and_equal_columns():
    column = torch.randn(1, 7)
    assert sum(fit_combination([column, column, column], 2 * column)) == pytest.approx(2.0, rel=RIDGE)


def test_equal_steps_of_a_gram_matrix_have_a_schedule():
    outputs = [torch.ones(1, 4)] * 6
    assert len(path_schedule(gram_matrix(outputs), np.ones(6), 3, 6)) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
def test_half_precision(name, dtype):
    pipe = make(name).to(dtype)
    made = tiny_models.calibrate(pipe, name)
    reference = call(pipe, name)
    with ertacache.apply(pipe, made):
        cached = call(pipe, name)
    assert cached.dtype == reference.dtype and cached.isfinite().all()
    assert (cached.float() - reference.float()).norm() / reference.float().norm() < 0.6


def test_float16_overflow_says_what_to_do():
    pipe = make("flux").to(torch.float16)
    made = tiny_models.calibrate(pipe, "flux")
    handle = pipe.transformer.register_forward_hook(lambda _m, _a, out: (out[0] * 60000,))
    with ertacache.apply(pipe, made), pytest.raises(NumericsError, match="bfloat16 or float32"):
        call(pipe, "flux")
    handle.remove()


@pytest.mark.parametrize("method", ["ertacache", "paper"])
def test_latents_of_one_value_a_channel(method):
    pipe = ToyPipeline(curved, side=1)
    made = ertacache.calibrate(
        pipe, ["p", "q"], seeds=(0, 1), computed_steps=4, num_inference_steps=8, method=method, progress=False
    )
    with ertacache.apply(pipe, made):
        result = pipe(["a"], generator=torch.Generator().manual_seed(5), num_inference_steps=8, output_type="latent")[0]
    assert result.shape == (1, 3, 1, 1) and result.isfinite().all()
