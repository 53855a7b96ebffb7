"""The attachment to a transformer alone where timesteps cannot be looked at, as on a CUDA device."""

import pytest
import torch
from bare_models import (
    STEPS,
    STOPS,
    noise_of,
    official_generate,
    scheduler_of,
    text_of,
)

import ertacache
from ertacache import branches
from ertacache.errors import MismatchError, StateError

pytest_plugins = ["bare_model_fixtures"]


class _Event:
    def synchronize(self) -> None:
        pass


@pytest.fixture
def on_device(monkeypatch) -> list[float]:
    """Timesteps as on a device: only at the ends of a run they may be read, in between they are copied out."""
    read: list[float] = []
    original = branches.read_value

    def reading(timestep):
        read.append(original(timestep))
        return read[-1]

    monkeypatch.setattr(branches, "host_value", lambda timestep: None)
    monkeypatch.setattr(branches, "read_value", reading)
    monkeypatch.setattr(
        branches,
        "copied_to_host",
        lambda timestep, largest: (
            timestep.reshape(-1)[:1].clone(),
            _Event(),
            branches.tolerance_of(largest, timestep),
        ),
    )
    return read


def test_on_a_device_only_timesteps_at_the_ends_of_a_run_are_waited_for(model, calibration, expected, on_device):
    with ertacache.apply(model, calibration, converted=True):
        for _ in range(2):
            on_device.clear()
            assert torch.allclose(official_generate(model, "x"), expected, atol=1e-5)
            times = scheduler_of().timesteps
            # of both branches at step 0, and of the second one at the last step; the first one's copy serves there
            assert on_device == [float(times[0])] * 2 + [float(times[-1])]


@pytest.mark.parametrize("stop_at", STOPS)
@pytest.mark.parametrize("same_texts", [False, True])
@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_on_a_device_a_run_given_up_is_right_or_an_error(
    model, calibration, expected, on_device, stop_at, same_texts, order
):
    texts = {"cond": [text_of("x")], "uncond": [text_of("")]}
    with ertacache.apply(model, calibration, converted=True):
        with pytest.raises(KeyboardInterrupt):
            official_generate(model, "x", seed=1, texts=texts, stop_at=stop_at)
        try:
            made = official_generate(model, "x", order=order, texts=texts if same_texts else None)
        except (StateError, MismatchError):
            assert same_texts  # fresh texts are always seen to be a new run
            made = official_generate(model, "x", order=order, texts=texts)  # and the error leaves a fresh start
        assert torch.allclose(made, expected, atol=1e-5)


def test_on_a_device_another_step_count_is_an_error(model, calibration, on_device):
    with ertacache.apply(model, calibration, converted=True), pytest.raises(StateError, match="step 1"):
        official_generate(model, "x", steps=STEPS + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device(model, calibration):
    """The copy in the background, for real."""
    model = model.cuda()
    times, texts = scheduler_of().timesteps.cuda(), [[text_of("x").cuda()], [text_of("").cuda()]]
    with torch.no_grad(), ertacache.apply(model, calibration, converted=True) as applied:
        for t in times:
            for text in texts:
                model([noise_of(0).cuda()], torch.stack([t]), text, 8)
        assert applied._attachment.run.step is None and applied.computed_calls == 10
        for text in texts:
            model([noise_of(0).cuda()], times[:1], text, 8)
        with pytest.raises(StateError, match="step 1"):
            for t in times[2:]:
                model([noise_of(0).cuda()], torch.stack([t]), texts[0], 8)


def test_tolerance_follows_the_dtype():
    assert branches.tolerance_of(999.0, 999) == pytest.approx(0.05)
    assert branches.tolerance_of(999.0, torch.tensor([999])) == pytest.approx(0.05)
    rounded = torch.tensor([999.0, 977.3, 501.1]).to(torch.bfloat16)
    for value, exact in zip(rounded, (999.0, 977.3, 501.1), strict=True):
        assert abs(float(value) - exact) <= branches.tolerance_of(exact, value) < 5
