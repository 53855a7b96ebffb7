"""The Wan2.1 folder: the official noise grid, the contracts on a random pipeline, the real architecture's shapes."""

import copy
import inspect
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file
from tiny_wan import NUM_STEPS, PROMPTS, SETTINGS, TEXT_TOKENS, TEXT_WIDTH, call, transformer, wan_pipeline
from torch import Tensor
from toys import plain_fields

import ertacache
from compare.rivals.base import bound_arguments
from ertacache import provenance, solver
from ertacache.errors import MismatchError, MismatchWarning
from ertacache.solver import StepSignature

FOLDER = Path(__file__).parents[1] / "ERTACache4Wan2.1"
VECTORS = Path(__file__).parent / "vectors" / "wan"
COMPUTED = [0, 2, 5, 8]


def load_module(name: str) -> ModuleType:
    """A file of the model folder as a module of a name of its own: every folder has a transformer.py."""
    spec = __import__("importlib.util").util.spec_from_file_location(f"wan_{name}", FOLDER / f"{name}.py")
    module = __import__("importlib.util").util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


schedulers, transformers = load_module("scheduler"), load_module("transformer")


def make_pipe(solver_name: str = "unipc", grid: str = "official", flow_shift: float = 5.0) -> WanPipeline:
    pipe = wan_pipeline()
    pipe.scheduler = schedulers.make_scheduler(solver_name, grid, flow_shift)
    return pipe


@pytest.fixture(scope="module")
def fitted() -> ertacache.Calibration:
    """Made on two prompts; it fits any pipeline that `make_pipe()` gives."""
    pipe = make_pipe()
    return ertacache.calibrate(
        pipe, PROMPTS, seeds=[0, 1], computed_steps=4, progress=False, negative_prompt="", **SETTINGS
    )


@pytest.fixture
def pipe() -> WanPipeline:
    return make_pipe()


# -- the noise grid --------------------------------------------------------------------------------------


def toy_velocity(x: Tensor, t: Tensor, branch: int) -> Tensor:
    """The model that the golden trajectories were made with; branch 1 is conditional, -1 is not."""
    return 0.6 * torch.sin(1.1 * x + 0.3 * branch) - 0.5 * x * (t / 1000) + 0.05 * branch


@pytest.mark.parametrize("path", sorted(VECTORS.glob("wan_*_*_*.json")), ids=lambda path: path.stem)
def test_official_grid_is_bit_identical_and_the_solver_goes_as_the_official_one(path):
    """The trajectory to the last bits only: sines and logarithms are rounded differently by different processors."""
    case, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    scheduler = schedulers.make_scheduler(case["solver"], "official", case["shift"])
    scheduler.set_timesteps(case["steps"])
    assert torch.equal(scheduler.sigmas, golden["out.sigmas"])
    assert torch.equal(scheduler.timesteps, golden["out.timesteps"])
    latents = golden["in.latents"][None]
    for step, t in enumerate(scheduler.timesteps):
        cond, uncond = toy_velocity(latents, t, 1), toy_velocity(latents, t, -1)
        guided = uncond + case["guide_scale"] * (cond - uncond)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        torch.testing.assert_close(latents[0], golden["mid.trajectory"][step], rtol=0, atol=1e-5)


def test_diffusers_has_another_grid():
    grids = []
    for grid in ("official", "diffusers"):
        scheduler = schedulers.make_scheduler("unipc", grid, 5.0)
        scheduler.set_timesteps(50)
        grids.append(scheduler.timesteps)
    assert int((grids[0] != grids[1]).sum()) == 27
    assert type(schedulers.make_scheduler("unipc", "diffusers", 5.0)) is UniPCMultistepScheduler
    assert type(schedulers.make_scheduler("euler", "diffusers", 5.0)) is FlowMatchEulerDiscreteScheduler


def test_euler_shares_the_sigmas_of_unipc():
    euler, unipc = (schedulers.make_scheduler(name, "official", 5.0) for name in ("euler", "unipc"))
    euler.set_timesteps(20)
    unipc.set_timesteps(20)
    assert torch.allclose(euler.sigmas, unipc.sigmas, atol=1e-6)


@pytest.mark.parametrize("grid", ["official", "diffusers"])
@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_step_gain_is_the_derivative_of_the_real_scheduler(name, grid):
    """By automatic differentiation and by finite differences of the real step, in mid-run with its history."""
    scheduler = schedulers.make_scheduler(name, grid, 5.0)
    scheduler.set_timesteps(20)
    sample = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    signature = StepSignature.of(inspect.signature(scheduler.step))
    for step, t in enumerate(scheduler.timesteps):
        output = torch.randn(sample.shape, generator=torch.Generator().manual_seed(step))
        offset, gain = solver.affine_step(scheduler, signature.call((output, t, sample), {}))
        leaf = output.clone().requires_grad_()
        stepped = copy.deepcopy(scheduler).step(leaf, t, sample, return_dict=False)[0]
        (derivative,) = torch.autograd.grad(stepped.sum(), leaf)
        assert torch.allclose(derivative, torch.full_like(derivative, gain), rtol=1e-3, atol=2e-6), (name, step)
        moved = copy.deepcopy(scheduler).step(output + 10.0, t, sample, return_dict=False)[0]
        assert torch.allclose((moved - stepped.detach()) / 10.0, torch.full_like(moved, gain), rtol=1e-2, atol=1e-5)
        # the drift target is the output that puts the step exactly on what it aims at
        aim = sample * 0.9
        landed = copy.deepcopy(scheduler).step((aim - offset) / gain, t, sample, return_dict=False)[0]
        assert torch.allclose(landed, aim, atol=2e-5)
        sample = stepped.detach()


def test_unipc_gain_has_its_closed_form():
    """In x0 space, sigma o enters predictor, corrector and the difference of x0s; all of them written out.

    With lambda = log(alpha / sigma), h its increment, r the ratio of the last increment to this one and
    B = expm1(-h): the corrector moves x by alpha_i B_{i-1} (rho_1 + ...) times x0, and the predictor takes
    x_{i+1} = sigma_{i+1} / sigma_i x - alpha_{i+1} B (x0 + (x0_{i-1} - x0) / (2 r)).
    """
    scheduler = schedulers.make_scheduler("unipc", "official", 5.0)
    scheduler.set_timesteps(20)
    s = scheduler.sigmas.double()
    sample, zero = torch.zeros(1, 2), torch.zeros(1, 2)
    signature = StepSignature.of(inspect.signature(scheduler.step))
    lam = torch.log(1 - s) - torch.log(s)
    for step, t in enumerate(scheduler.timesteps[:2]):
        gain = solver.affine_step(scheduler, signature.call((zero, t, sample), {}))[1]
        h = lam[step + 1] - lam[step]
        b = torch.expm1(-h)
        if step == 0:  # first order, nothing to correct yet: this is Euler's increment
            expected = (1 - s[1]) * b * s[0]
            assert expected.item() == pytest.approx((s[1] - s[0]).item(), abs=1e-9)
        else:
            r = (lam[step - 1] - lam[step]) / h
            # corrector of order 1: x <- ... - alpha_i B_{i-1} (x0_i - x0_{i-1}) / 2
            correction = 0.5 * (1 - s[step]) * torch.expm1(-(lam[step] - lam[step - 1])) * s[step]
            through_sample = s[step + 1] / s[step] * correction
            predictor = (1 - s[step + 1]) * b * (1 - 0.5 / r) * s[step]
            expected = through_sample + predictor
        assert gain == pytest.approx(expected.item(), rel=2e-4)
        sample = scheduler.step(zero, t, sample, return_dict=False)[0]


# -- text ------------------------------------------------------------------------------------------------


def test_prompts_are_cleaned_as_the_official_code_does():
    cases = json.loads((VECTORS / "wan_text.json").read_text())["cases"]
    assert [prompt_clean(case["input"]) for case in cases] == [case["whitespace"] for case in cases]


# -- the contracts ---------------------------------------------------------------------------------------


def without_rectification(calibration: ertacache.Calibration, computed: list[int]) -> ertacache.Calibration:
    return replace(calibration, computed_steps=computed, **plain_fields(calibration.num_inference_steps))


def test_all_steps_computed_is_bit_identical_and_so_is_the_pipeline_afterwards(pipe, fitted):
    reference = call(pipe, output_type="pt")
    with ertacache.apply(pipe, without_rectification(fitted, list(range(NUM_STEPS)))):
        assert torch.equal(call(pipe, output_type="pt"), reference)
    with ertacache.apply(pipe, fitted):
        assert not torch.equal(call(pipe, output_type="pt"), reference)
    assert torch.equal(call(pipe, output_type="pt"), reference)
    assert type(pipe.transformer) is WanTransformer3DModel and "step" not in vars(pipe.scheduler)


def test_both_calls_of_a_reused_step_are_saved(pipe, fitted):
    with ertacache.apply(pipe, fitted) as applied:
        call(pipe)
    assert (applied.computed_calls, applied.reused_calls) == (2 * 4, 2 * (NUM_STEPS - 4))


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_fitting_through_the_real_scheduler_stays_on_the_reference(name):
    """On the runs that were fitted to: what the random network does elsewhere says nothing."""
    pipe = make_pipe(name)
    arguments = {**SETTINGS, "num_inference_steps": 20, "negative_prompt": ""}
    asked = {"computed_steps": 10, "effort": "fast", "progress": False}
    made = ertacache.calibrate(pipe, PROMPTS, seeds=[100, 101], **asked, **arguments)
    reference = call(pipe, **arguments)

    def error(calibration: ertacache.Calibration) -> float:
        with ertacache.apply(pipe, calibration):
            return float((call(pipe, **arguments) - reference).square().mean().sqrt())

    assert error(made) < 0.2 * error(without_rectification(made, made.computed_steps))


def test_an_interrupted_run_leaves_nothing_behind(pipe, fitted):
    class Stop(Exception):
        pass

    def stop_at(wanted: int):
        def callback(_, step, __, state):
            if step == wanted:
                raise Stop
            return state

        return callback

    with ertacache.apply(pipe, fitted):
        expected = call(pipe)
        for step in (0, 1, 4, NUM_STEPS - 1):
            with pytest.raises(Stop):
                call(pipe, callback_on_step_end=stop_at(step))
            assert torch.equal(call(pipe), expected)

        def interrupt(running, step, _, state):
            running._interrupt = step == 3
            return state

        call(pipe, callback_on_step_end=interrupt)  # diffusers' own way to stop: the loop goes on without steps
        assert torch.equal(call(pipe), expected)


def hand_written_loop(pipe: WanPipeline, order: tuple[str, ...], guidance: float) -> Tensor:
    """Sampling without WanPipeline's loop, branches in any order."""
    text = {
        name: pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)[0]
        for name, prompt in (("cond", PROMPTS[0]), ("uncond", ""))
    }
    pipe.scheduler.set_timesteps(NUM_STEPS)
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(100))
    for t in pipe.scheduler.timesteps:
        outputs = {}
        for name in order:
            outputs[name] = pipe.transformer(latents, t.expand(1), text[name], return_dict=False)[0]
        velocity = outputs["cond"]
        if "uncond" in outputs:
            velocity = outputs["uncond"] + guidance * (velocity - outputs["uncond"])
        latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def test_cond_and_uncond_in_either_order(pipe, fitted):
    with ertacache.apply(pipe, fitted):
        expected = call(pipe, PROMPTS[0])
        assert torch.equal(hand_written_loop(pipe, ("cond", "uncond"), 5.0), expected)
        assert torch.equal(hand_written_loop(pipe, ("uncond", "cond"), 5.0), expected)


def test_another_guidance_scale_warns_and_runs_right_and_none_is_refused(pipe, fitted):
    plain = without_rectification(fitted, list(range(NUM_STEPS)))
    reference = call(pipe, guidance_scale=3.0)
    with ertacache.apply(pipe, plain), pytest.warns(MismatchWarning, match="guidance scale is 3"):
        assert torch.equal(call(pipe, guidance_scale=3.0), reference)
    with ertacache.apply(pipe, fitted) as applied, pytest.warns(MismatchWarning, match="calibration is for 5"):
        made = call(pipe, guidance_scale=3.0)
    assert applied.computed_calls == 2 * 4 and applied.reused_calls == 2 * (NUM_STEPS - 4)
    assert made.isfinite().all() and not torch.equal(made, reference)
    with ertacache.apply(pipe, fitted), pytest.raises(MismatchError, match="guidance is of another kind"):
        call(pipe, guidance_scale=1.0)


def test_a_batch_of_prompts_is_what_each_prompt_is_alone(pipe, fitted):
    with warnings.catch_warnings(), ertacache.apply(pipe, fitted):
        warnings.simplefilter("error", MismatchWarning)
        both = call(pipe)
        assert torch.allclose(call(pipe, PROMPTS[0])[0], both[0], atol=1e-4)
        assert torch.allclose(call(pipe, PROMPTS[0], num_videos_per_prompt=1)[0], both[0], atol=1e-4)


@pytest.mark.parametrize("change", [{"num_frames": 9}, {"height": 48, "width": 32}, {"num_frames": 1}])
def test_other_frame_count_or_size_warns_and_runs(pipe, fitted, change):
    with ertacache.apply(pipe, fitted):
        first = call(pipe)
        with pytest.warns(MismatchWarning, match="latents are"):
            assert call(pipe, **change).isfinite().all()
        assert torch.equal(call(pipe), first)


def test_other_step_count_is_refused(pipe, fitted):
    with ertacache.apply(pipe, fitted), pytest.raises(MismatchError, match=r"12 steps.*for 10"):
        call(pipe, num_inference_steps=12)


@pytest.mark.parametrize(
    ("name", "grid", "shift", "message"),
    [
        ("unipc", "diffusers", 5.0, "OfficialUniPCScheduler"),
        ("unipc", "official", 3.0, r"flow_shift is 3\.0"),
        ("euler", "official", 5.0, "OfficialEulerScheduler"),
    ],
)
def test_other_grid_shift_or_solver_is_refused(fitted, name, grid, shift, message):
    with pytest.raises(MismatchError, match=message):
        ertacache.apply(make_pipe(name, grid, shift), fitted)


def test_a_grid_that_moved_without_the_configuration_is_refused(pipe, fitted):
    text = torch.zeros(1, TEXT_TOKENS, TEXT_WIDTH)
    with ertacache.apply(pipe, fitted):
        pipe.scheduler.set_timesteps(sigmas=torch.linspace(0.9, 0.1, NUM_STEPS).numpy())
        with pytest.raises(MismatchError, match="noise grid differs at step 0"):
            pipe.transformer(torch.zeros(1, 4, 2, 4, 6), timestep=torch.tensor([900]), encoder_hidden_states=text)


def test_the_published_method_runs_on_unipc(pipe):
    made = ertacache.calibrate(
        pipe, PROMPTS, computed_steps=6, method="paper", progress=False, negative_prompt="", effort="fast", **SETTINGS
    )
    with ertacache.apply(pipe, made):
        assert call(pipe).isfinite().all()


# -- the model -------------------------------------------------------------------------------------------


def test_modulated_input_is_what_the_first_attention_gets(pipe):
    seen = []
    model = pipe.transformer
    handle = model.blocks[0].attn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kwargs = {
        "hidden_states": torch.randn(2, 4, 2, 4, 6),
        "timestep": torch.tensor([700, 700]),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, TEXT_WIDTH),
    }
    with torch.no_grad():
        model(**kwargs)
        signal = transformers.modulated_input(model, bound_arguments(model, (), kwargs))
    handle.remove()
    assert torch.equal(signal, seen[0]) and signal.shape == (2, 2 * 2 * 3, 32)


FULL_SIZE = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
}


def test_real_architecture_and_latent_size_with_one_layer(fitted):
    """Wan2.1-T2V-1.3B at 832x480, 81 frames, on the meta device: shapes without numbers."""

    class HostScheduler(schedulers.OfficialUniPCScheduler):
        def set_timesteps(self, *args, device=None, **kwargs) -> None:  # a grid without numbers cannot be checked
            super().set_timesteps(*args, **kwargs)

    with torch.device("meta"):
        model = transformer(1, **FULL_SIZE)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "timestep": kwargs["timestep"].to("meta")}), with_kwargs=True
    )
    scheduler = HostScheduler(**schedulers.make_scheduler("unipc", "official", 5.0).config)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(6)
    timesteps, sigmas = solver.host_grid(scheduler)
    calibration = replace(
        fitted,
        num_inference_steps=6,
        computed_steps=[0, 2, 4],
        coefficients=[[1.0], [1.1], [1.0, 0.1], [1.2, -0.2], [1.0, 0.1, 0.1], [1.0, 0.2, -0.1]],
        timesteps=timesteps,
        sigmas=sigmas,
        model=provenance.model_identity(model),
        settings={},
        scheduler=solver.identity(scheduler),
        latent_shape=[16, 21, 60, 104],
    )
    text = torch.empty(1, 512, 4096, device="meta")
    with warnings.catch_warnings(), ertacache.apply(pipe, calibration) as applied:
        warnings.simplefilter("error", MismatchWarning)
        latents = pipe(
            prompt_embeds=text,
            negative_prompt_embeds=text.clone(),
            num_inference_steps=6,
            output_type="latent",
            height=480,
            width=832,
            num_frames=81,
        )[0]
    assert latents.shape == (1, 16, 21, 60, 104) and latents.is_meta
    assert (applied.computed_calls, applied.reused_calls) == (6, 6)


def test_full_width_with_one_layer_computes(fitted):
    """The same width with numbers, on a small clip."""
    torch.manual_seed(0)
    model = transformer(1, **FULL_SIZE)
    kwargs = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 6, 4096)}
    with torch.no_grad():
        output = model(hidden_states=torch.randn(1, 16, 2, 4, 4), return_dict=False, **kwargs)[0]
    assert output.shape == (1, 16, 2, 4, 4) and output.isfinite().all()


# -- the embedded pipeline -------------------------------------------------------------------------------

needs_tiny = pytest.mark.skipif(
    not (FOLDER / "tiny" / "model_index.json").exists(), reason="the embedded pipeline is not trained yet"
)


@needs_tiny
def test_embedded_pipeline_is_small():
    assert sum(f.stat().st_size for f in (FOLDER / "tiny").rglob("*") if f.suffix != ".png") < 8 * 2**20


@needs_tiny
def test_checked_in_calibrations_belong_to_the_embedded_pipeline():
    tiny = WanPipeline.from_pretrained(FOLDER / "tiny", dtype=torch.float32)
    tiny.scheduler = schedulers.make_scheduler("unipc", "official", 14.0)
    files = sorted((FOLDER.parent / "tests/golden/calibrations/wan").glob("tiny-*unipc-official-shift14*.json"))
    assert files
    for path in files:
        with ertacache.apply(tiny, path) as applied:
            assert applied.calibration.predicted["psnr"] > 20
