"""What went wrong for users of caches, with the smallest pipeline that shows it: right here, or refused by name."""

import copy
import pickle
import threading
import warnings
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from builders import (
    LTX2,
    PIXART,
    SIZE,
    SPRINT,
    VIDEO,
    WAN,
    Case,
    cosmos,
    cosmos3,
    flux,
    flux_controlnet,
    framepack,
    ltx,
    ltx2,
    picture,
    pixart,
    qwen21,
    sana_sprint,
    sd3,
    wan,
)
from cases import STEPS, TRUE_CFG, calibrated, sample
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from torch import nn

import ertacache
from ertacache import provenance
from ertacache.errors import CalibrationError, MismatchError, MismatchWarning, StateError
from ertacache.fit import recipe, runs
from ertacache.metrics import psnr


@pytest.fixture(scope="module")
def plain() -> SimpleNamespace:
    """FLUX with a calibration, what it makes uncached and cached."""
    case = Case(flux(), SIZE)
    made = calibrated(case)
    reference = sample(case)
    with ertacache.apply(case.pipe, made):
        cached = sample(case)
    assert not torch.equal(reference, cached)
    return SimpleNamespace(case=case, pipe=case.pipe, made=made, reference=reference, cached=cached)


def warned(case: Case, made: ertacache.Calibration, **changes) -> list[str]:
    """What a run of a calibration warns of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with ertacache.apply(case.pipe, made):
            sample(case, **changes)
    return [str(one.message) for one in seen if issubclass(one.category, MismatchWarning)]


# -- arguments, guidance, networks (S1, S2, S7, S8) ------------------------------------------------------------


def test_another_kind_of_guidance_is_refused(plain):
    with ertacache.apply(plain.pipe, plain.made), pytest.raises(MismatchError, match=r"2 samples .* for 1"):
        sample(plain.case, **TRUE_CFG)
    assert torch.equal(sample(plain.case), plain.reference)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"guidance_scale": 7.0}, "guidance scale is 7.0, the calibration is for 3.5"),
        ({"true_cfg_scale": 2.0}, "true cfg scale is 2.0, the calibration is for 1.0"),
        ({"max_sequence_length": 77}, "max sequence length is 77, the calibration is for 512"),
    ],
    ids=str,
)
def test_an_argument_that_differs_is_named(plain, changes, named):
    assert warned(plain.case, plain.made) == []
    assert any(named in said for said in warned(plain.case, plain.made, **changes))


def test_negative_prompts_of_each_prompt_are_kept_apart_and_compared_with_none():
    case = Case(flux(), {**SIZE, "true_cfg_scale": 4.0})
    made = calibrated(case, negative_prompt=["x", "y", "z"], effort="best")
    assert made.settings["negative_prompt"] == "one for each prompt"
    assert warned(case, made, negative_prompt="w") == []
    assert any(
        "negative prompt" in said
        for said in warned(
            Case(case.pipe, {**case.arguments, **TRUE_CFG}),
            calibrated(Case(case.pipe, {**case.arguments, **TRUE_CFG})),
            negative_prompt="w",
        )
    )


EXPERTS = {**WAN, "guidance_scale": 4.0, "guidance_scale_2": 3.0}


@pytest.fixture(scope="module")
def experts() -> tuple[Case, ertacache.Calibration]:
    case = Case(wan(experts=True), EXPERTS)
    return case, calibrated(case)


def test_the_second_network_is_compared_too(experts):
    case, made = experts
    assert set(made.pipeline["networks"]) == {"transformer_2"} and warned(case, made) == []
    for parameter in case.pipe.transformer_2.parameters():
        parameter.data.add_(0.01)
    assert any("transformer_2" in said for said in warned(case, made))
    for parameter in case.pipe.transformer_2.parameters():
        parameter.data.sub_(0.01)
    case.pipe.register_to_config(boundary_ratio=0.5)
    assert any("boundary_ratio is 0.5" in said for said in warned(case, made))
    case.pipe.register_to_config(boundary_ratio=0.9)
    with pytest.raises(MismatchError, match=r"transformer_2.*has none"):
        ertacache.apply(wan(), made)


class Tuned(nn.Module):
    """A linear layer with low-rank adapters, as peft makes them."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling, self.merged_adapters, self.active_adapters, self.disable_adapters = {}, [], [], False

    def add(self, name: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parts, rows, columns in (
            (self.lora_A, 2, self.base_layer.in_features),
            (self.lora_B, self.base_layer.out_features, 2),
        ):
            parts[name] = nn.Linear(columns, rows, bias=False)
            nn.init.normal_(parts[name].weight, generator=generator)
        self.scaling[name], self.active_adapters = 1.0, [name]

    def get_delta_weight(self, name: str) -> torch.Tensor:
        return self.scaling[name] * self.lora_B[name].weight @ self.lora_A[name].weight


def test_the_fingerprint_follows_what_adapters_make_of_the_weights():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    base = provenance.weights_fingerprint(model)
    model[1] = tuned = Tuned(model[1])
    tuned.add("one", 1)
    tuned.add("two", 2)
    two = provenance.weights_fingerprint(model)
    tuned.active_adapters = ["one"]
    one, state = provenance.weights_fingerprint(model), provenance.weights_state(model)
    tuned.scaling["one"] = 0.5
    half = provenance.weights_fingerprint(model)
    assert len({base, one, two, half}) == 4 and state != provenance.weights_state(model)
    tuned.scaling["one"], tuned.disable_adapters = 1.0, True
    assert provenance.weights_fingerprint(model) == base
    tuned.disable_adapters = False
    for parts in (tuned.lora_A, tuned.lora_B):
        parts["other"] = parts.pop("one")
    tuned.scaling, tuned.active_adapters = {"other": 1.0}, ["other"]
    assert provenance.weights_fingerprint(model) == one  # whatever it is called
    tuned.base_layer.weight.data += tuned.get_delta_weight("other")
    tuned.merged_adapters = ["other"]
    assert provenance.weights_fingerprint(model) == one  # fused
    model[1] = tuned.base_layer
    assert provenance.weights_fingerprint(model) == one  # fused and unloaded


def test_a_controlnet_rests_and_what_runs_at_every_step_counts(monkeypatch):
    case = Case(flux("FluxControlNetPipeline", controlnet=flux_controlnet()), {**SIZE, "control_image": picture(3)})
    made, calls = calibrated(case), []
    case.pipe.controlnet.register_forward_pre_hook(lambda *_: calls.append(1))
    with ertacache.apply(case.pipe, made):
        sample(case)
    assert len(calls) == len(made.computed_steps) and made.pipeline["every_step"] == {}
    monkeypatch.setattr("ertacache.attach.NETWORK_NAMES", ("transformer",))
    share = calibrated(case).pipeline["every_step"]["controlnet"]
    size = {
        name: sum(p.numel() for p in getattr(case.pipe, name).parameters()) for name in ("controlnet", "transformer")
    }
    assert share == pytest.approx(size["controlnet"] / sum(size.values()), abs=1e-3)
    other = replace(made, pipeline={**made.pipeline, "every_step": {"controlnet": share}})
    assert other.speedup == pytest.approx(1 / (share + (1 - share) * 3 / STEPS)) and other.speedup < made.speedup


# -- what a step is (S3, S5, S6, S11) ----------------------------------------------------------------------------


def test_tokens_that_do_not_move_do_not_spoil_the_fit():
    case = Case(ltx(), {**VIDEO, "image": picture(0, 32)})
    made = calibrated(case, computed_steps=2)
    reference, found = sample(case), []
    for rows in (made.coefficients, [[1.0]] * STEPS):
        with ertacache.apply(case.pipe, replace(made, coefficients=rows)):
            found.append(float(psnr(sample(case), reference)))
    assert found[0] > found[1]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    ],
    ids=["lcm", "stochastic"],
)
def test_noise_of_the_global_generator_is_repeated(scheduler):
    case = Case(flux(scheduler=scheduler()), SIZE)
    before = torch.get_rng_state()
    assert calibrated(case, computed_steps=STEPS).predicted["psnr"] == 120.0
    assert torch.equal(torch.get_rng_state(), before)
    made, found = calibrated(case), []
    references = [sample(case, index) for index in range(6)]
    for rows in (made.coefficients, [[1.0]] * STEPS):
        with ertacache.apply(case.pipe, replace(made, coefficients=rows)):
            cached = [psnr(sample(case, index), one) for index, one in enumerate(references)]
        found.append(float(torch.stack(cached).mean()))
    assert found[0] > found[1] + 0.5 and abs(found[0] - made.predicted["psnr"]) < 2.0


def test_noise_that_cannot_be_repeated_is_said():
    case = Case(flux(), SIZE)
    forward, source = case.pipe.transformer.forward, torch.Generator().manual_seed(1)

    def noisy(*args, **kwargs):
        (output,) = forward(*args, **kwargs)
        return (output + torch.randn(output.shape, generator=source),)

    case.pipe.transformer.forward = noisy
    with pytest.raises(CalibrationError, match="does not repeat itself"):
        calibrated(case)


@pytest.mark.parametrize("cuts", ["clip_sample", "thresholding"])
def test_a_step_that_cuts_off_values_is_refused_by_name(cuts):
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, cuts: True})
    with pytest.raises(CalibrationError, match=f"DDIMScheduler.*{cuts}=False"):
        calibrated(Case(pixart(scheduler=scheduler), PIXART))
    assert calibrated(Case(pixart(scheduler=diffusers.DDIMScheduler(clip_sample=False)), PIXART)).predicted


@pytest.mark.parametrize("scheduler", ["LMSDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_published_method_is_exact_with_all_steps_and_refused_where_it_does_harm(scheduler):
    case = Case(pixart(scheduler=getattr(diffusers, scheduler)()), PIXART)
    everything, reference = calibrated(case, method="paper", computed_steps=STEPS), sample(case)
    with ertacache.apply(case.pipe, everything):
        assert torch.equal(sample(case), reference)
    with pytest.raises(CalibrationError, match="does harm"):
        calibrated(case, method="paper")


def test_coefficients_that_lose_to_plain_reuse_are_not_kept(plain, monkeypatch, capsys):
    original = recipe.fit_step_by_step
    wrong = lambda *given: replace(original(*given), outputs=[[0.2]] * STEPS)  # noqa: E731
    monkeypatch.setattr(recipe, "fit_step_by_step", wrong)
    monkeypatch.setattr(
        recipe,
        "_fitted_to",
        lambda runs, rows, schedule, _: recipe.cache_of(
            recipe.calibration_of(runs.record, schedule, wrong(runs, schedule), None)
        ),
    )
    made = calibrated(plain.case, progress=True)
    assert made.coefficients == [[1.0]] * STEPS and "plain reuse is kept" in capsys.readouterr().err
    reference = sample(plain.case)
    with ertacache.apply(plain.pipe, made):
        assert abs(float(psnr(sample(plain.case), reference)) - made.predicted["psnr"]) < 8


# -- batches (S4, C3, C5, C7, C8) -------------------------------------------------------------------------------


def test_prompts_that_a_batch_would_mix_are_run_side_by_side(monkeypatch):
    case = Case(sd3("StableDiffusion3PAGPipeline", pag_applied_layers="blocks.1"), {**SIZE, "guidance_scale": 4.0})
    seen = []
    monkeypatch.setattr(
        recipe, "choose_steps", lambda record, k, o=recipe.choose_steps: seen.append(record) or o(record, k)
    )
    calibrated(case, micro_batch=2)
    alone = [
        case.pipe(
            prompt,
            generator=torch.Generator().manual_seed(i),
            output_type="pt",
            **{**case.arguments, "num_inference_steps": STEPS},
        )[0]
        for i, prompt in enumerate(("a red fox", "a blue boat", "two cups of tea"))
    ]
    torch.testing.assert_close(seen[0].pixels, torch.cat(alone), atol=1e-4, rtol=0)


def test_prompts_side_by_side_are_fitted_as_in_a_batch(plain):
    """And the calling thread's generators are as they were."""
    wanted, before = calibrated(plain.case), torch.get_rng_state()
    case = replace(plain.case, per_prompt=lambda count: {"guidance_scale": [3.5] * count})
    made = calibrated(case)
    assert torch.equal(torch.get_rng_state(), before)
    assert made.computed_steps == wanted.computed_steps
    for row, other in zip(made.coefficients, wanted.coefficients, strict=True):
        assert row == pytest.approx(other, abs=1e-3)
    with pytest.raises(CalibrationError, match="2 values for 3 prompts"):
        calibrated(replace(plain.case, per_prompt=lambda _: {"guidance_scale": [1.0, 2.0]}))


def test_a_video_that_comes_back_as_frames_is_one_result(monkeypatch):
    """Of a pipeline that takes the first prompt of a list, and makes as many frames as three prompts could share."""
    case, seen = Case(cosmos3(), {**WAN, "num_frames": 9, "guidance_scale": 4.0}), []
    monkeypatch.setattr(recipe, "choose_steps", lambda record, _: seen.append(record) or [0, 1, 2])
    calibrated(case)
    assert len(seen[0]) == len(seen[0].pixels) == 3
    assert not torch.equal(seen[0].outputs[0][0], seen[0].outputs[0][2])


def test_networks_may_return_dictionaries():
    case = Case(flux(), SIZE)
    wanted, forward = calibrated(case), case.pipe.transformer.forward
    case.pipe.transformer.forward = lambda *args, **kwargs: {0: forward(*args, **kwargs)[0]}
    assert calibrated(case).coefficients == wanted.coefficients


def test_a_pipeline_that_takes_one_prompt_only_is_calibrated_prompt_by_prompt(plain):
    case, encode = Case(flux(), SIZE), plain.pipe.encode_prompt

    def single(prompt=None, **rest):
        if isinstance(prompt, list):
            raise ValueError("one prompt only")
        return encode(prompt, **rest)

    case.pipe.encode_prompt = single
    assert calibrated(case).computed_steps == plain.made.computed_steps
    case.pipe.encode_prompt = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        calibrated(case)


def test_more_prompts_than_a_micro_batch_read_their_own_text():
    case = Case(qwen21(), {"height": 32, "width": 32, **TRUE_CFG})
    one, other = (calibrated(case, micro_batch=size, effort="fast") for size in (8, 2))
    for row, same in zip(one.coefficients, other.coefficients, strict=True):
        assert row == pytest.approx(same, abs=1e-2)


# -- handles, copies, other pipelines (S9, S10, S12, C1, C11) ---------------------------------------------------------


def test_pipelines_from_the_same_components_run_uncached_and_say_so(plain):
    with ertacache.apply(plain.pipe, plain.made):
        assert type(plain.pipe.transformer) is diffusers.FluxTransformer2DModel
        other = diffusers.FluxImg2ImgPipeline.from_pipe(plain.pipe)
        other.encode_prompt = plain.pipe.encode_prompt
        other.set_progress_bar_config(disable=True)
        assert other.transformer is plain.pipe.transformer
        case = Case(other, {**SIZE, "image": picture(0), "strength": 0.6})
        with pytest.warns(MismatchWarning, match="FluxImg2ImgPipeline shares parts"):
            found = sample(case)
        assert torch.equal(sample(plain.case), plain.cached)
    assert torch.equal(found, sample(case))
    assert type(diffusers.AutoPipelineForInpainting.from_pipe(plain.pipe)).__name__ == "FluxInpaintPipeline"


def test_another_cache_is_refused_and_an_exact_one_is_not(plain):
    transformer = plain.pipe.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    for refused in (lambda: ertacache.apply(plain.pipe, plain.made), lambda: calibrated(plain.case)):
        with pytest.raises(StateError, match="another cache is on"):
            refused()
    transformer.disable_cache()
    with ertacache.apply(plain.pipe, plain.made):
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(StateError, match="disable_cache"):
            sample(plain.case)
        transformer.disable_cache()
        assert torch.equal(sample(plain.case), plain.cached)


def test_a_block_that_is_left_brings_back_what_it_replaced(plain):
    other = replace(plain.made, computed_steps=[0], coefficients=[[1.0]] * STEPS)
    with ertacache.apply(plain.pipe, plain.made) as outer:
        with ertacache.apply(plain.pipe, other):
            inner = sample(plain.case)
        assert torch.equal(sample(plain.case), plain.cached) and not torch.equal(inner, plain.cached)
        newer = ertacache.apply(plain.pipe, other)
    assert torch.equal(sample(plain.case), inner)  # the older handle's exit removes nothing newer
    newer.__exit__()
    assert torch.equal(sample(plain.case), plain.reference) and outer._closed
    with ertacache.apply(plain.pipe, plain.made), ertacache.apply(plain.pipe, other):
        ertacache.remove(plain.pipe)
        assert torch.equal(sample(plain.case), plain.reference)
    assert torch.equal(sample(plain.case), plain.reference)


def test_copies_are_attached_and_pickles_are_plain(plain):
    with ertacache.apply(plain.pipe, plain.made):
        duplicate = copy.deepcopy(plain.pipe)
        assert torch.equal(sample(replace(plain.case, pipe=duplicate)), plain.cached)
        stub = plain.pipe.__dict__.pop("encode_prompt")  # a function of the test's own
        thawed = pickle.loads(pickle.dumps(plain.pipe))
        plain.pipe.encode_prompt = thawed.encode_prompt = stub
        assert type(thawed) is diffusers.FluxPipeline
        assert torch.equal(sample(replace(plain.case, pipe=thawed)), plain.reference)
        assert torch.equal(sample(plain.case), plain.cached)
    assert torch.equal(sample(replace(plain.case, pipe=duplicate)), plain.reference)


def test_a_server_with_a_scheduler_for_each_request_gets_what_each_gets_alone(plain):
    """diffusers' own pattern: 8 threads, 100 requests; some set the grid before the pipeline does."""
    made: dict[int, torch.Tensor] = {}

    def request(number: int) -> torch.Tensor:
        local = copy.copy(plain.pipe)
        local.scheduler = copy.deepcopy(plain.pipe.scheduler)
        if number % 2:
            local.scheduler.set_timesteps(STEPS)
        return sample(replace(plain.case, pipe=local), number % 5)

    with ertacache.apply(plain.pipe, plain.made) as applied:
        alone = [sample(plain.case, seed) for seed in range(5)]

        def work(first: int) -> None:
            for number in range(first, 100, 8):
                made[number] = request(number)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not applied._attachment.runs and not applied._attachment.calls
    assert len(made) == 100 and all(torch.equal(made[n], alone[n % 5]) for n in made)


# -- runs (C9, C10, strength, several latents) --------------------------------------------------------------------


def test_a_run_from_the_middle_is_calibrated_for_its_strength():
    case = Case(flux("FluxImg2ImgPipeline"), {**SIZE, "image": picture(1), "strength": 0.6})
    made = calibrated(case)
    assert made.num_inference_steps == 4 and len(made.sigmas) == 5 and made.computed_steps[0] == 0
    assert warned(case, made) == []
    with ertacache.apply(case.pipe, made), pytest.raises(StateError, match="same strength"):
        sample(case, strength=1.0)
    whole = calibrated(case, strength=1.0)
    with ertacache.apply(case.pipe, whole), pytest.raises(StateError, match="starts at step 2"):
        sample(case)
    with pytest.raises(CalibrationError, match="between 1 and 4"):
        calibrated(case, computed_steps=5)


def test_where_a_run_begins_is_its_own():
    """A run from the grid's first step, while another one is under way from the middle of its own."""
    case = Case(flux("FluxImg2ImgPipeline"), {**SIZE, "image": picture(1), "strength": 0.6})
    made, found = calibrated(case), []
    whole = {"strength": 1.0, "num_inference_steps": 4, "sigmas": [1 - step / STEPS for step in range(2, STEPS)]}

    def meanwhile(*_) -> None:
        if not found:
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(sample(replace(case, pipe=local), **whole)))
            thread.start()
            thread.join()

    with ertacache.apply(case.pipe, made):
        alone = [sample(case), sample(case, **whole)]
        local = copy.copy(case.pipe)
        local.scheduler = copy.deepcopy(case.pipe.scheduler)
        hook = case.pipe.transformer.register_forward_pre_hook(meanwhile)
        assert torch.equal(sample(case), alone[0]) and torch.equal(found[1], alone[1])
        hook.remove()


@pytest.mark.parametrize(
    "case",
    [
        lambda: Case(cosmos("Cosmos2TextToImagePipeline"), SIZE),  # changes its grid once it is set
        lambda: Case(sana_sprint(), {**SPRINT, "intermediate_timesteps": None}),  # whose default is another value
    ],
    ids=["grid", "none"],
)
def test_what_was_watched_is_what_is_compared(case, tmp_path):
    case = case()
    with ertacache.enable(case.pipe, samples=2, store=tmp_path, progress=False) as enabled:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MismatchWarning)
            for index in range(3):
                sample(case, index)
        assert [one.accelerated for one in enabled.status()] == [1]


def test_a_grid_with_an_entry_more_than_steps_gives_a_file_that_loads(tmp_path):
    case = Case(sana_sprint(), {**SPRINT, "intermediate_timesteps": None})
    made = calibrated(case)
    assert ertacache.Calibration.load(made.save(tmp_path / "sprint.json")) == made
    assert len(made.timesteps) == STEPS and warned(case, made) == []


def test_several_runs_in_a_call_are_calibrated_one_at_a_time():
    small = {"height": 32, "width": 32, "latent_window_size": 2, "image": picture(0, 32)}
    case = Case(framepack(), {**small, "num_frames": 5})
    made = calibrated(case, effort="fast")
    with pytest.raises(CalibrationError, match="several runs in one call"):
        calibrated(replace(case, arguments={**small, "num_frames": 10}), effort="fast")
    with ertacache.apply(case.pipe, made) as applied:
        sample(case, num_frames=10)
    assert (applied.computed_calls, applied.reused_calls) == (6, 6)


def test_video_and_audio_have_coefficients_of_their_own(tmp_path):
    case = Case(ltx2(), LTX2)
    made = calibrated(case)
    (audio,) = made.streams
    assert len(audio["coefficients"]) == STEPS and audio["coefficients"] != made.coefficients
    assert ertacache.Calibration.load(made.save(tmp_path / "ltx2.json")) == made
    with ertacache.apply(case.pipe, replace(made, streams=None)), pytest.raises(StateError, match="scheduler 2"):
        sample(case)
    with pytest.raises(CalibrationError, match="'balanced'"):
        calibrated(case, effort="best")


# -- messages ----------------------------------------------------------------------------------------------------


def test_threads_on_one_pipeline_are_told_to_take_copies(plain):
    """Without ERTACache they would share the scheduler's step without a word."""
    inside, leave, said = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        leave.wait(30)

    hook = plain.pipe.transformer.register_forward_pre_hook(wait)
    with ertacache.apply(plain.pipe, plain.made):
        thread = threading.Thread(target=lambda: said.append(sample(plain.case)))
        thread.start()
        inside.wait(30)
        with pytest.raises(StateError, match=r"copy\.deepcopy"):
            sample(plain.case)
        leave.set()
        thread.join()
    hook.remove()
    assert torch.equal(said[0], plain.cached)


def test_a_transformer_that_is_given_thousandths_is_followed(plain):
    with ertacache.apply(plain.pipe.transformer, plain.made):
        assert torch.allclose(sample(plain.case), plain.cached, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"prompt_embeds": torch.ones(1, 5, 12)}, "prompts or prompt_embeds, not both"),
    ],
    ids=["micro_batch", "prompt_embeds"],
)
def test_a_request_that_cannot_be_is_one_line(plain, changes, said):
    with pytest.raises(CalibrationError, match=said) as error:
        calibrated(plain.case, **changes)
    assert "\n" not in str(error.value) and "tensor(" not in str(error.value)


def test_other_requests_that_cannot_be(plain):
    with ertacache.apply(plain.pipe, plain.made), pytest.raises(CalibrationError, match=r"ertacache\.remove"):
        calibrated(plain.case)
    with pytest.raises(CalibrationError, match="not NoneType"):
        ertacache.apply(plain.pipe, None)
    with pytest.raises(MismatchError, match="but a UNet"):
        ertacache.calibrate(SimpleNamespace(unet=nn.Linear(1, 1), scheduler=1), ["p"], computed_steps=1)
    assert calibrated(plain.case, seeds=0, effort="fast").prompts["count"] == 3
    assert runs.is_plain({"a": [torch.ones(1), None, "x"]}) and not runs.is_plain([object()])
