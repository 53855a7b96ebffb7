"""What people meet with the official packages: configurations, wording, scales of time, several processes."""

import dataclasses
import types
import warnings
from collections import UserDict
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from bare_models import STEPS, Pipeline, WanModel, noise_of, official_generate, scheduler_of, text_of
from torch import nn
from toys import ToyPipeline, curved
from transformers import PretrainedConfig

import ertacache
from ertacache import provenance, solver
from ertacache.errors import MismatchError, MismatchWarning, StateError
from ertacache.official import ranks
from ertacache.official.loops import EulerLoop

pytest_plugins = ["bare_model_fixtures"]
pytestmark = pytest.mark.core


# -- configurations --------------------------------------------------------------------------------------


@dataclasses.dataclass
class FluxParams:
    depth: int = 2


class STDiT3Config(PretrainedConfig):
    model_type = "STDiT3"

    def __init__(self, depth=2, **kwargs):
        self.depth = depth
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    "config",
    [
        {"depth": 2},
        UserDict(depth=2, _name_or_path="x"),
        {"depth": 2, "dtype": "bfloat16", "transformers_version": "5.0"},
        FluxParams(),
        types.SimpleNamespace(depth=2),
        STDiT3Config(),
        STDiT3Config(dtype="bfloat16", architectures=["STDiT3"]),
    ],
)
def test_a_configuration_of_any_kind_is_what_it_says(config):
    model = WanModel()
    model.config = config
    assert solver.config_of(model) == {"depth": 2}
    plain = types.SimpleNamespace(config={"depth": 2})
    assert provenance.config_hash(model) == provenance.config_hash(plain) is not None


@pytest.mark.parametrize("config", [None, 3, "a.json", FluxParams])
def test_no_configuration_is_none(config):
    assert provenance.config_hash(types.SimpleNamespace(config=config)) is None
    assert provenance.config_hash(types.SimpleNamespace()) is None


def test_a_place_in_memory_is_no_setting():
    hashes = {provenance.config_hash(types.SimpleNamespace(config={"act": nn.Identity(), "f": object()})) for _ in "ab"}
    assert len(hashes) == 1


@pytest.mark.parametrize("config", [STDiT3Config(depth=3), FluxParams(3), types.SimpleNamespace(depth=3)])
def test_what_has_another_configuration_is_refused_and_what_has_the_same_is_taken(config, calibration):
    pipe = Pipeline()
    pipe.transformer.config = config
    fitted = replace(calibration, model=provenance.model_identity(pipe.transformer))
    ertacache.apply(pipe.transformer, fitted)
    ertacache.remove(pipe.transformer)
    config.depth = 4
    with pytest.raises(MismatchError, match="another configuration"):
        ertacache.apply(pipe.transformer, fitted)


# -- wording ---------------------------------------------------------------------------------------------


class SampleOnly:
    """A scheduler whose loop is inside, as Open-Sora's and VideoSys' are; it has no configuration."""

    def sample(self, model, z):
        return z


class WanT2V:
    def __init__(self):
        self.model = WanModel()

    def generate(self, prompt):
        raise AssertionError


def test_the_way_on_is_named(calibration):
    with pytest.raises(MismatchError, match="converted=True"):
        ertacache.apply(WanModel(), calibration)
    for attempt in (
        lambda pipe: ertacache.apply(pipe, calibration),
        lambda pipe: ertacache.calibrate(pipe, ["a"], computed_steps=5),
    ):
        with pytest.raises(MismatchError, match=r"\.model\b"):
            attempt(WanT2V())
        pipe = types.SimpleNamespace(transformer=WanModel(), scheduler=SampleOnly())
        with pytest.raises(MismatchError, match=r"SampleOnly .*\.transformer\b"):
            attempt(pipe)
        with pytest.raises(MismatchError, match=r"\.driver_worker\.transformer\b"):
            attempt(types.SimpleNamespace(driver_worker=pipe))


# -- time ------------------------------------------------------------------------------------------------


class Unit(WanModel):
    """Counts time from 1 to 0, as the official flux does."""

    def forward(self, x, t, context, seq_len):
        return super().forward(x, t * 1000, context, seq_len)


def unit_loop(model, dtype=torch.float32, steps=STEPS, shift=3.0, first=0):
    scheduler, text, latents = scheduler_of(steps, shift), [text_of("x")], noise_of(7)
    with torch.no_grad():
        for t in scheduler.timesteps[first:]:
            made = model([latents], torch.stack([t / 1000]).to(dtype), text, 8)[0]
            latents = scheduler.step(made[None], t, latents[None], return_dict=False)[0][0]
    return latents


def test_time_from_one_to_zero_is_the_same_grid(calibration, model):
    with ertacache.apply(model, calibration, converted=True):
        expected = official_generate(model, "x", order=["cond"])
    unit = Unit()
    with ertacache.apply(unit, calibration, converted=True) as applied:
        assert torch.allclose(unit_loop(unit), expected, atol=1e-4)
        unit_loop(unit, torch.bfloat16)
        with pytest.raises(MismatchError):
            unit_loop(unit, shift=5.0)
        with pytest.raises(MismatchError):
            unit_loop(unit, steps=STEPS + 1)
        with pytest.raises(MismatchError, match="starts at timestep"):
            unit_loop(unit, first=5)
        official_generate(unit, "x")  # of the other scale, which the same model may be given
    assert applied.reused_calls >= 20


@pytest.mark.parametrize(("moved", "refused"), [(3e-5, False), (3e-4, True)])
def test_the_tolerance_goes_with_the_scale(calibration, moved, refused):
    unit, text = Unit(), [text_of("x")]
    times = (scheduler_of().timesteps / 1000).tolist()
    times[1] += moved
    with ertacache.apply(unit, calibration, converted=True):
        unit([noise_of(0)], torch.tensor(times[:1]), text, 8)
        if refused:
            with pytest.raises(MismatchError):
                unit([noise_of(0)], torch.tensor(times[1:2]), text, 8)
        else:
            unit([noise_of(0)], torch.tensor(times[1:2]), text, 8)


# -- the published method --------------------------------------------------------------------------------


def test_the_published_method_runs_on_a_model_alone_without_its_grid(model):
    """Residual reuse and error model are affine in the output, so they act on branches as on what is guided."""
    paper = ertacache.calibrate(
        Pipeline(), ["a", "b"], seeds=(0, 1), computed_steps=5, method="paper", num_inference_steps=10, progress=False
    )
    plain = replace(paper, adjusted_sigmas=None, adjusted_timesteps=None)
    pipe = Pipeline()
    with ertacache.apply(pipe, plain):
        expected = pipe("x", generator=torch.Generator().manual_seed(7))[0][0]
    with pytest.warns(MismatchWarning, match="timestep adjustment"):
        ertacache.apply(model, paper, converted=True)
    made = official_generate(model, "x")
    ertacache.remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ertacache.apply(model, plain, converted=True)
    assert torch.equal(made, official_generate(model, "x"))
    assert torch.allclose(made, expected, atol=1e-4)
    assert not torch.allclose(made, official_generate(WanModel(), "x"), atol=1e-3)


# -- several processes -----------------------------------------------------------------------------------


class Manager:
    """VideoSys' parallel manager, of which every part of its models has one."""

    dp_size = 1

    def __init__(self, sp_size):
        self.sp_size, self.cp_size = sp_size, 1


def sequence_parallel(model):
    model.parallel_manager = Manager(2)


def replaced_forward(model):
    model.forward = types.MethodType(WanModel.forward, model)


def flagged(model):
    model.enable_sequence_parallelism = True


def wrapped(model):
    model.block = type("FullyShardedDataParallel", (nn.Module,), {})()


@pytest.fixture
def two_ranks(monkeypatch):
    """This process as rank 0 of two; what rank 1 says is written by the test."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    return store


@pytest.mark.parametrize("share", [sequence_parallel, replaced_forward, flagged, wrapped])
def test_a_shared_model_that_is_attached_on_one_rank_is_refused(model, calibration, two_ranks, share):
    share(model)
    with pytest.raises(StateError, match="2 processes share"):
        ertacache.apply(model, calibration, converted=True)
    official_generate(model, "x")
    assert model.calls == 2 * STEPS  # nothing is attached
    other = ranks.Roll([0, 1])
    two_ranks.set(other._key(1), "attached")  # another schedule
    with pytest.raises(StateError, match="2 processes share"):
        ertacache.apply(model, calibration, converted=True)
    two_ranks.set(ranks.Roll(calibration.computed_steps)._key(1), "attached")
    with ertacache.apply(model, calibration, converted=True) as applied:
        assert two_ranks.check([ranks.Roll(calibration.computed_steps)._key(0)])
        official_generate(model, "x")
    assert applied.reused_calls == 10
    assert not two_ranks.check([ranks.Roll(calibration.computed_steps)._key(0)])


def test_a_shared_pipeline_is_not_enabled_on_one_rank(two_ranks, tmp_path):
    pipe = ToyPipeline(curved)
    sequence_parallel(pipe.transformer)
    with pytest.raises(StateError, match="2 processes share"):
        ertacache.enable(pipe, store=tmp_path)


@pytest.mark.parametrize("share", [lambda model: setattr(model, "parallel_manager", Manager(1)), lambda model: None])
def test_prompts_that_are_shared_out_need_no_other_rank(model, calibration, two_ranks, share):
    share(model)
    with ertacache.apply(model, calibration, converted=True) as applied:
        official_generate(model, "x")
    assert applied.reused_calls == 10


# -- loops that make their steps themselves --------------------------------------------------------------


class STDiT3(nn.Module):
    """Both branches in one batch, and twice the channels out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x, timestep, y):
        time = timestep.reshape(-1, 1, 1, 1) / 1000
        made = torch.tanh(y - x) * (0.5 + time) + torch.sin(3 * time + y)
        return torch.cat([made, made], dim=1)


def rflow(model, prompt, seed, steps=10, power=1.0):
    """Open-Sora's `scheduler.sample`: data - noise, so steps are positive."""
    z = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([len(prompt), 0.0]).reshape(2, 1, 1, 1) / 5
    times = [torch.tensor([1000 * (1 - i / steps) ** power]) for i in range(steps)]
    for i, t in enumerate(times):
        made = model(torch.cat([z, z]), torch.cat([t, t]), y=y).chunk(2, dim=1)[0]
        cond, uncond = made.chunk(2)
        dt = t - times[i + 1] if i + 1 < steps else t
        z = z + (uncond + 3.0 * (cond - uncond)) * dt[:, None, None, None] / 1000
    return z


def test_a_loop_without_a_scheduler_is_calibrated_where_it_is():
    model = STDiT3()
    loop = EulerLoop(model, rflow, lambda latents: latents.sigmoid(), guidance_scale=3.0)
    prompts = ["a", "bb", "cccc", "dddddd"]
    reference = rflow(model, "ccc", 9)
    every = ertacache.calibrate(loop, prompts, seeds=range(4), computed_steps=10, progress=False)
    made = ertacache.calibrate(loop, prompts, seeds=range(4), computed_steps=5, progress=False)
    assert made.timesteps == pytest.approx([1000 - 100 * i for i in range(10)])
    with ertacache.apply(model, every):
        assert torch.equal(rflow(model, "ccc", 9), reference)
    with ertacache.apply(model, made) as applied:
        alone = rflow(model, "ccc", 9)
    assert applied.reused_calls == 5
    with ertacache.apply(loop, made):
        through = loop("ccc", torch.Generator().manual_seed(9), output_type="latent")[0]
    assert torch.allclose(alone, through, atol=1e-5)
    every_other = replace(made, coefficients=[[1.0]] * 10)
    with ertacache.apply(model, every_other):
        naive = rflow(model, "ccc", 9)
    assert (alone - reference).norm() < 0.5 * (naive - reference).norm()


def test_a_loop_that_makes_other_steps_is_refused():
    def heun(model, prompt, seed):
        z = torch.zeros(1, 2, 3, 3)
        for t in (1000.0, 500.0):
            z = z + model(torch.cat([z, z]), torch.tensor([t, t]), y=z).chunk(2, dim=1)[0][:1]
        return z

    loop = EulerLoop(STDiT3(), heun, torch.sigmoid, guidance_scale=3.0)
    with pytest.raises(StateError, match="Euler"):
        loop("a")
