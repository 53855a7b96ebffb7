"""The attachment to a transformer alone: stand-ins with the call shapes of the official packages, in their loops."""

import warnings
from dataclasses import replace

import pytest
import torch
from bare_models import (
    GUIDANCE,
    LATENT_SHAPE,
    STEPS,
    STOPS,
    Pipeline,
    STDiT3,
    WanModel,
    noise_of,
    official_generate,
    scheduler_of,
    text_of,
)
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from toys import plain_fields

import ertacache
from ertacache.errors import MismatchError, MismatchWarning, StateError

pytest_plugins = ["bare_model_fixtures"]
pytestmark = pytest.mark.core


def test_linear_guidance_gives_what_the_attachment_at_the_scheduler_gives(model, calibration, expected):
    plain = official_generate(model, "x")
    with ertacache.apply(model, calibration, converted=True) as applied:
        made = official_generate(model, "x")
        assert torch.allclose(made, expected, atol=1e-5)
        assert not torch.allclose(made, plain, atol=1e-5)
    assert (applied.computed_calls, applied.reused_calls) == (10, 10)


def test_fewer_calls_of_the_model_itself(model, calibration):
    with ertacache.apply(model, calibration, converted=True):
        official_generate(model, "x")
    assert model.calls == 2 * 5


def test_branches_in_either_order_and_runs_one_after_the_other(model, calibration, expected):
    with ertacache.apply(model, calibration, converted=True):
        for order in (("cond", "uncond"), ("uncond", "cond"), ("cond", "uncond")):
            assert torch.allclose(official_generate(model, "x", order=order), expected, atol=1e-5)
            official_generate(model, "another prompt", seed=3)


def test_one_branch_alone(model, calibration):
    single = Pipeline()
    single.guidance_scale = 1.0
    with warnings.catch_warnings(), ertacache.apply(single, calibration):
        warnings.simplefilter("ignore", MismatchWarning)
        wanted = single("x", generator=torch.Generator().manual_seed(7))[0][0]
    with ertacache.apply(model, calibration, converted=True):
        assert torch.allclose(official_generate(model, "x", order=["cond"]), wanted, atol=1e-5)


def test_all_steps_computed_is_bit_identical_and_removal_leaves_nothing(model, calibration):
    reference = official_generate(model, "x")
    every = replace(
        calibration,
        computed_steps=list(range(STEPS)),
        **plain_fields(STEPS),
    )
    before = set(vars(model))
    with ertacache.apply(model, every, converted=True):
        assert torch.equal(official_generate(model, "x"), reference)
    assert type(model) is WanModel and set(vars(model)) == before
    assert torch.equal(official_generate(model, "x"), reference)


def test_container_and_dtype_are_the_models_own(calibration):
    class Half(WanModel):
        def forward(self, x, t, context, seq_len):
            return [o.to(torch.bfloat16) for o in super().forward(x, t, context, seq_len)]

    model, text = Half(), [text_of("x"), text_of("y")]
    with ertacache.apply(model, calibration, converted=True):
        for t in scheduler_of().timesteps:
            made = model([noise_of(0), noise_of(1)], t.expand(2), text, seq_len=8)
            assert isinstance(made, list) and len(made) == 2
            assert made[0].dtype == torch.bfloat16 and list(made[0].shape) == LATENT_SHAPE


def test_what_the_loop_writes_into_its_output_stays_its_own(model, calibration):
    """The cached output is a copy."""
    reused = replace(calibration, computed_steps=[0], **plain_fields(STEPS))
    text, latents = [text_of("x")], [noise_of(0)]
    with ertacache.apply(model, reused, converted=True):
        times = scheduler_of().timesteps
        first = model(latents, times[:1], text, 8)[0]
        kept = first.clone()
        first.zero_()
        second = model(latents, times[1:2], text, 8)[0]
        assert torch.equal(second, kept)
        second.zero_()
        assert torch.equal(model(latents, times[2:3], text, 8)[0], kept)


class Static(WanModel):
    """Writes its outputs into the same memory at every call, as a model replayed from a CUDA graph does."""

    def forward(self, x, t, context, seq_len):
        made = super().forward(x, t, context, seq_len)
        self.__dict__.setdefault("buffer", torch.empty_like(made[0])).copy_(made[0])
        return [self.buffer]


def test_outputs_that_are_written_over_give_the_same(calibration, expected):
    model = Static()

    @torch.no_grad()
    def generate() -> Tensor:
        scheduler, latents, texts = scheduler_of(), noise_of(7), [[text_of("x")], [text_of("")]]
        for t in scheduler.timesteps:
            cond, uncond = (model([latents], torch.stack([t]), text, 8)[0].clone() for text in texts)
            guided = uncond + GUIDANCE * (cond - uncond)
            latents = scheduler.step(guided[None], t, latents[None], return_dict=False)[0][0]
        return latents

    with ertacache.apply(model, calibration, converted=True):
        assert torch.allclose(generate(), expected, atol=1e-5)


def kept_bytes(applied) -> list[int]:
    """Of each branch, memory that its histories keep alive."""
    branches = applied._attachment.run.branches.values()
    return [sum(o.untyped_storage().nbytes() for cache in b.caches for o in cache.history) for b in branches]


@pytest.mark.parametrize("kind", [WanModel, STDiT3])
def test_a_branch_holds_the_outputs_that_it_combines(kind, calibration):
    """Four of the latents' channels only, wherever the model's own output lies."""
    longer = replace(calibration, coefficients=[[1.0, 0.1, 0.1, 0.1][: step + 1] for step in range(STEPS)])
    longer = replace(longer, computed_steps=[0, 1, 2, 3, 4, 7], sample_coefficients=None)
    model, latents, inside, after = kind(), noise_of(0), [], []
    text = torch.stack([text_of("x")])
    with torch.no_grad(), ertacache.apply(model, longer, converted=True) as applied:
        model.register_forward_pre_hook(lambda *_: inside.append(max(kept_bytes(applied), default=0)))
        for t in scheduler_of().timesteps[:-1]:
            made = model(latents[None] if kind is STDiT3 else [latents], t.expand(1), text, 8)
            after.append(max(kept_bytes(applied)))
    size = latents.nbytes
    assert [held // size for held in inside] == [0, 1, 2, 3, 4, 4]
    assert after[-1] == max(after) == 4 * size
    assert len(made[0]) == (6 if kind is STDiT3 else 3)


def test_channels_that_no_calibration_knows_are_the_models_own_or_zero(calibration):
    model, y = STDiT3(), torch.stack([text_of("x")])
    with torch.no_grad(), ertacache.apply(model, calibration, converted=True) as applied:
        for step, t in enumerate(scheduler_of().timesteps):
            made = model(noise_of(7)[None], t.expand(1), y=y)
            own = STDiT3()(noise_of(7)[None], t.expand(1), y=y)
            assert made.shape == own.shape
            computed = step in calibration.computed_steps
            assert torch.equal(made[:, 3:], own[:, 3:] if computed else torch.zeros_like(own[:, 3:]))
    assert applied.reused_calls == 5


@pytest.mark.parametrize("stop_at", STOPS)
@pytest.mark.parametrize("same_texts", [False, True])
@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_a_run_given_up_half_way_does_not_reach_the_next(model, calibration, expected, stop_at, same_texts, order):
    texts = {"cond": [text_of("x")], "uncond": [text_of("")]}
    with ertacache.apply(model, calibration, converted=True):
        with pytest.raises(KeyboardInterrupt):
            official_generate(model, "x", seed=1, texts=texts, stop_at=stop_at)
        made = official_generate(model, "x", order=order, texts=texts if same_texts else None)
        assert torch.allclose(made, expected, atol=1e-5)
        assert torch.allclose(official_generate(model, "x", order=order), expected, atol=1e-5)


def test_a_run_given_up_within_the_model_is_forgotten_at_once(model, calibration, expected):
    with ertacache.apply(model, calibration, converted=True) as applied:
        model.fail_at = 3
        with pytest.raises(KeyboardInterrupt):
            official_generate(model, "x", seed=1)
        assert applied._attachment.run.step is None
        assert torch.allclose(official_generate(model, "x"), expected, atol=1e-5)


def test_nothing_is_held_after_a_run(model, calibration):
    with ertacache.apply(model, calibration, converted=True) as applied:
        official_generate(model, "x")
        assert applied._attachment.run.branches == {} and applied._attachment.run.step is None


def test_other_step_count_or_grid_is_refused(model, calibration, expected):
    with ertacache.apply(model, calibration, converted=True):
        with pytest.raises(MismatchError, match=r"step 1\): another number of steps"):
            official_generate(model, "x", steps=STEPS + 1)
        with pytest.raises(MismatchError, match="step 1"):
            official_generate(model, "x", shift=5.0)
        assert torch.allclose(official_generate(model, "x"), expected, atol=1e-5)


def test_a_run_that_starts_in_the_middle_is_refused(model, calibration):
    with ertacache.apply(model, calibration, converted=True), pytest.raises(MismatchError, match="starts at timestep"):
        model([noise_of(0)], scheduler_of().timesteps[3:4], [text_of("x")], 8)


def test_texts_made_anew_at_every_step_are_refused(model, calibration):
    times = scheduler_of().timesteps
    with ertacache.apply(model, calibration, converted=True):
        model([noise_of(0)], times[:1], [text_of("x")], 8)
        model([noise_of(0)], times[:1], [text_of("")], 8)
        with pytest.raises((StateError, MismatchError)):
            model([noise_of(0)], times[1:2], [text_of("x")], 8)


def test_a_branch_that_is_called_twice_a_step_is_refused(model, calibration):
    text, t = [text_of("x")], scheduler_of().timesteps[4:5]
    with ertacache.apply(model, calibration, converted=True):
        for step in range(5):
            model([noise_of(0)], scheduler_of().timesteps[step : step + 1], text, 8)
        with pytest.raises(MismatchError, match="called twice"):
            model([noise_of(0)], t, text, 8)


def test_a_branch_that_pauses_is_refused_when_it_comes_back(model, calibration):
    texts = {"cond": [text_of("x")], "uncond": [text_of("")]}
    times = scheduler_of().timesteps
    with ertacache.apply(model, calibration, converted=True):
        for step, names in enumerate((["cond", "uncond"], ["cond"], ["cond"])):
            for name in names:
                model([noise_of(0)], times[step : step + 1], texts[name], 8)
        with pytest.raises(StateError, match="left out"):
            model([noise_of(0)], times[2:3], texts["uncond"], 8)


def test_guidance_that_stops_early_is_a_run_like_any_other(model, calibration, expected):
    texts = {"cond": [text_of("x")], "uncond": [text_of("")]}
    with ertacache.apply(model, calibration, converted=True) as applied:
        for step, t in enumerate(scheduler_of().timesteps):
            for name in ("cond", "uncond") if step < 6 else ("cond",):
                model([noise_of(0)], torch.stack([t]), texts[name], 8)
        assert applied._attachment.run.step is None
        assert torch.allclose(official_generate(model, "x"), expected, atol=1e-5)


def test_batched_branches_with_more_channels(calibration):
    """Open-Sora's call shape: conditional and unconditional halves of one batch, (B, 2C, ...) out."""
    model, pipe = STDiT3(), Pipeline()
    pipe.transformer.model = WanModel()
    scheduler, latents = scheduler_of(), noise_of(7).unsqueeze(0)
    y = torch.stack([text_of("x"), text_of("")])
    with torch.no_grad(), ertacache.apply(pipe, calibration):
        wanted = pipe("x", generator=torch.Generator().manual_seed(7))[0]
    with torch.no_grad(), ertacache.apply(model, calibration, converted=True) as applied:
        for t in scheduler.timesteps:
            both = model(torch.cat([latents, latents]), t.expand(2), y=y, fps=24)
            cond, uncond = both.chunk(2, dim=1)[0].chunk(2)
            latents = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, latents, return_dict=False)[0]
    assert torch.allclose(latents, wanted, atol=1e-5)
    assert (applied.computed_calls, applied.reused_calls) == (5, 5)


def test_a_diffusers_transformer_in_a_loop_of_its_own(calibration):
    """The class that was calibrated needs no `converted`, and gives tuples."""
    pipe = Pipeline()
    with ertacache.apply(pipe, calibration):
        wanted = pipe("x", generator=torch.Generator().manual_seed(7))[0]
    with ertacache.apply(pipe.transformer, calibration):
        assert torch.allclose(pipe("x", generator=torch.Generator().manual_seed(7))[0], wanted, atol=1e-5)


def test_wrapped_models_are_followed_by_the_arguments_of_the_inner_one(calibration, expected):
    class Wrapper(nn.Module):  # as torch's parallel wrappers are
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapped = Wrapper(WanModel())
    with ertacache.apply(wrapped, calibration, converted=True):
        assert torch.allclose(official_generate(wrapped, "x"), expected, atol=1e-5)


def test_mismatches(model, calibration):
    with pytest.raises(MismatchError, match="WanModel"):
        ertacache.apply(model, calibration)
    with pytest.raises(MismatchError, match="not for a pipeline"):
        ertacache.apply(Pipeline(), calibration, converted=True)
    with pytest.raises(MismatchError, match="takes none of the arguments"):
        ertacache.apply(nn.Linear(2, 2), calibration, converted=True)
    paper = ertacache.calibrate(
        Pipeline(), ["a"], computed_steps=5, method="paper", num_inference_steps=STEPS, progress=False
    )
    with pytest.raises(MismatchError, match="published method"):
        ertacache.apply(model, paper, converted=True)
    with pytest.warns(MismatchWarning, match="latents are"), ertacache.apply(model, calibration, converted=True):
        model([torch.zeros(3, 2, 6, 6)], scheduler_of().timesteps[:1], [text_of("x")], 8)


def test_one_attachment_at_a_time(calibration):
    pipe = Pipeline()
    with ertacache.apply(pipe, calibration), pytest.raises(StateError, match="attached already"):
        ertacache.apply(pipe.transformer, calibration)
    with ertacache.apply(pipe.transformer, calibration):
        with pytest.raises(StateError, match="attached already"):
            ertacache.apply(pipe, calibration)
        with pytest.raises(StateError, match="attached already"):  # cached outputs are nothing to calibrate on
            ertacache.calibrate(pipe, ["a"], computed_steps=5, num_inference_steps=STEPS, progress=False)
        ertacache.apply(pipe.transformer, calibration)  # its own is replaced, and stays where the block is left
    ertacache.remove(pipe.transformer)
    assert set(vars(pipe.transformer)) == set(vars(Pipeline().transformer))


def test_euler_loop_on_a_bare_transformer(calibration):
    """Nothing depends on the solver but the timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    model = WanModel()
    other = replace(calibration, timesteps=scheduler.timesteps.tolist())
    text = [text_of("x")]
    with ertacache.apply(model, other, converted=True) as applied:
        for t in scheduler.timesteps:
            model([noise_of(0)], t.reshape(1).to(torch.bfloat16), text, 8)
    assert applied.computed_calls == 5
