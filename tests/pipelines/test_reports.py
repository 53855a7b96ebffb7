"""What users of other caches reported, where no other test has it; docs/reports.md says which report each is for."""

import functools
import re
import warnings
from dataclasses import replace
from types import MethodType

import bare_models
import diffusers
import pytest
import torch
from builders import PIXART, SIZE, WAN, Case, embedded, flux, flux2, picture, pixart, sd3, wan
from cases import GUIDED, ROOT, STEPS, calibrated, check, sample
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import ertacache
from ertacache.errors import MismatchError, MismatchWarning, StateError

PAGE = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def fitted() -> tuple[Case, ertacache.Calibration]:
    case = Case(flux(), SIZE)
    return case, calibrated(case, effort="fast")


def cached(case: Case, made: ertacache.Calibration, **changes) -> torch.Tensor:
    """A result of a pipeline that is attached for it alone."""
    with ertacache.apply(case.pipe, made):
        return sample(case, **changes)


# -- steps, stages, requests -----------------------------------------------------------------------------------


def test_steps_that_a_call_leaves_out_are_those_of_the_run(fitted):
    case, made = fitted

    def call(**steps) -> torch.Tensor:
        noise = torch.Generator().manual_seed(7)
        return case.pipe("a green hill", generator=noise, output_type="pt", **case.arguments, **steps)[0]

    with ertacache.apply(case.pipe, made) as applied:
        wanted = call(num_inference_steps=STEPS)
        with pytest.raises(MismatchError, match="28 steps, the calibration is for 6"):  # the pipeline's own default
            call()
        assert torch.equal(call(sigmas=[1 - i / STEPS for i in range(STEPS)]), wanted)
    assert applied.reused_calls == STEPS


def test_two_stages_with_one_transformer_each_take_their_own_calibration(fitted):
    """A picture, then the same at twice the size and some of the steps."""
    case, made = fitted
    second = Case(
        diffusers.FluxImg2ImgPipeline.from_pipe(case.pipe),
        {"height": 32, "width": 32, "strength": 0.6},
        lambda count: {"image": [picture(i, 32) for i in range(count)]},
    )
    second.pipe.encode_prompt = case.pipe.encode_prompt
    stages = [(case, made), (second, calibrated(second, effort="fast"))]
    uncached = [sample(one) for one, _ in stages]
    alone = [cached(*stage) for stage in stages]
    assert [len(one.computed_steps) for _, one in stages] == [3, 3] and stages[1][1].num_inference_steps == 4
    for _ in range(2):
        assert all(torch.equal(cached(*stage), found) for stage, found in zip(stages, alone, strict=True))
    assert all(torch.equal(sample(one), found) for (one, _), found in zip(stages, uncached, strict=True))


def test_each_pipeline_keeps_its_own_calibration(fitted):
    case, made = fitted
    other = replace(made, computed_steps=[0, 4], coefficients=[[1.0]] * STEPS)
    two = Case(flux(), SIZE)
    alone = [cached(case, made), cached(case, other)]
    with ertacache.apply(case.pipe, made), ertacache.apply(two.pipe, other):
        for _ in range(2):
            assert torch.equal(sample(case), alone[0]) and torch.equal(sample(two), alone[1])


def test_reference_images_change_from_call_to_call():
    """None, one, two others: tokens that the transformer sees, and the scheduler does not."""
    case = Case(flux2("Flux2KleinPipeline"), SIZE)
    made = calibrated(case, effort="fast")
    images = [diffusers.utils.pt_to_pil(picture(seed, 64))[0] for seed in (5, 6)]
    given = [None, images[:1], images[::-1]]
    alone = [cached(case, made, image=image) for image in given]
    with ertacache.apply(case.pipe, made):
        assert all(torch.equal(sample(case, image=given[i]), alone[i]) for i in (1, 2, 0, 1))
    assert not any(torch.equal(alone[i], alone[i - 1]) for i in range(3))


def test_a_transformer_is_trained_as_ever_while_the_cache_is_on():
    pipe = wan()
    made = calibrated(Case(pipe, {**WAN, **GUIDED}), effort="fast")
    inputs = torch.randn(1, 4, 2, 8, 8), torch.tensor([500]), torch.randn(1, 5, 12)

    def gradients() -> list[torch.Tensor]:
        output = pipe.transformer(*inputs, return_dict=False)[0]
        return list(torch.autograd.grad(output.square().sum(), pipe.transformer.parameters()))

    expected = gradients()
    with ertacache.apply(pipe, made):
        sample(Case(pipe, {**WAN, **GUIDED}))
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))


# -- what others put on the transformer ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before", "while"])
def test_a_forward_that_somebody_replaces_is_used_and_theirs_to_take_off(first, fitted):
    case, made = fitted
    model = case.pipe.transformer
    plain, accelerated = sample(case), cached(case, made)

    def patched(self, *args, **kwargs):
        return (type(self).forward(self, *args, **kwargs)[0] + 0.1,)

    def patch() -> None:
        model.forward = MethodType(patched, model)

    patch()
    theirs = sample(case)
    with ertacache.apply(case.pipe, made):
        patch()
        wanted = sample(case)
    del model.forward
    assert not torch.equal(theirs, plain) and not torch.equal(wanted, accelerated)

    if first:
        patch()
    with ertacache.apply(case.pipe, made):
        patch()
        assert torch.equal(sample(case), wanted)
        del model.forward
        assert torch.equal(sample(case), accelerated)
        if not first:
            patch()
    assert torch.equal(sample(case), plain if first else theirs)
    vars(model).pop("forward", None)


@pytest.mark.parametrize("mark", ["enable_teacache", "magcache_thresh", "_is_cached", "first block"])
def test_another_cache_in_the_transformer_is_refused_attached_alone_too(mark, fitted, monkeypatch):
    """Those that replace the forward of a class say so in an attribute of it."""
    case, made = fitted
    model = case.pipe.transformer
    if mark == "first block":
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    else:
        monkeypatch.setattr(type(model), mark, 0.2, raising=False)
    for refused in (case.pipe, model):
        with pytest.raises(StateError, match="another cache is on"):
            ertacache.apply(refused, made)
    with pytest.raises(StateError, match="another cache is on"):
        calibrated(case)
    if mark == "first block":
        model.disable_cache()


def with_image_prompts() -> Case:
    """FLUX with an IP-Adapter, each prompt with a picture's embedding of its own."""
    own = lambda count: {"ip_adapter_image_embeds": [[embedded(str(i), 1, 8)] for i in range(count)]}  # noqa: E731
    case = Case(flux(), {**SIZE, "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 8)]}, own)
    model = case.pipe.transformer
    torch.manual_seed(0)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 12, 4)])
    processors = model.attn_processors
    new = {name: FluxIPAdapterAttnProcessor(width, 12) for name in processors if "single" not in name}
    model.set_attn_processor({**processors, **new})
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for parameter in [p for name, p in model.named_parameters() if "_ip." in name or "hid_proj" in name]:
        torch.nn.init.normal_(parameter, std=0.2)
    return case


def test_an_image_adapter_is_calibrated_and_its_scale_is_noticed():
    case = with_image_prompts()
    made, reference = calibrated(case, effort="fast"), sample(case)
    everything = replace(made, computed_steps=list(range(STEPS)), coefficients=[[1.0]] * STEPS)
    assert torch.equal(cached(case, everything), reference)
    with ertacache.apply(case.pipe, made), warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        before = sample(case)
        case.pipe.set_ip_adapter_scale(0.3)
        with pytest.raises(MismatchWarning, match="weights differ"):
            sample(case)
        case.pipe.set_ip_adapter_scale(1.0)
        assert torch.equal(sample(case), before)


def test_arguments_with_several_values_are_compared(tmp_path):
    """Scale of a LoRA, layers that guidance skips."""
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9, "joint_attention_kwargs": {"scale": 0.5}}
    case = Case(sd3(), {**SIZE, **GUIDED, **skipped})
    made = calibrated(case, effort="fast")
    assert made.settings["skip_guidance_layers"] == "[1]"
    with ertacache.apply(case.pipe, made), warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        sample(case, skip_guidance_layers=(1,))
        with pytest.raises(MismatchWarning, match="skip guidance layers"):
            sample(case, skip_guidance_layers=[0])
        with pytest.raises(MismatchWarning, match="joint attention kwargs"):
            sample(case, joint_attention_kwargs=None)
        own = replace(case, pipe=sd3())
        enabled = ertacache.enable(own.pipe, store=tmp_path, progress=False, samples=1)
        assert not torch.equal(sample(own), sample(own)) and enabled.status()[0].accelerated == 1


# -- solvers, guidance, models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_solvers_that_call_twice_a_step_or_add_noise_are_followed(scheduler):
    check(Case(pixart(scheduler=getattr(diffusers, scheduler)()), PIXART))


def test_three_branches_of_guidance_each_have_their_own_outputs():
    """And fewer of them in some steps."""
    model, pipe = bare_models.WanModel(), bare_models.Pipeline()
    made = ertacache.calibrate(
        pipe, ["a", "b"], computed_steps=5, num_inference_steps=bare_models.STEPS, effort="fast", progress=False
    )
    texts = [[bare_models.text_of(name)] for name in ("prompt", "image", "")]
    latents = [[bare_models.noise_of(step)] for step in range(bare_models.STEPS)]

    def outputs(steps: list[int]) -> dict[tuple[int, int], torch.Tensor]:
        return {
            (step, branch): model(latents[step], torch.stack([t]), texts[branch], 8)[0]
            for step, t in enumerate(bare_models.scheduler_of().timesteps)
            for branch in range(steps[step])
        }

    with torch.no_grad(), ertacache.apply(model, made, converted=True):
        alone = {}
        for branch, text in enumerate(texts):
            for step, t in enumerate(bare_models.scheduler_of().timesteps):
                alone[step, branch] = model(latents[step], torch.stack([t]), text, 8)[0]
        for steps in ([3] * bare_models.STEPS, [3] * 4 + [1] * (bare_models.STEPS - 4), [3] * bare_models.STEPS):
            assert all(torch.equal(output, alone[key]) for key, output in outputs(steps).items())


WAN_IMAGE = {
    "A14B": {"experts": True, "transformer": {"in_channels": 12}},
    "5B": {"expand_timesteps": True},
}


@pytest.mark.parametrize("kind", WAN_IMAGE)
def test_image_to_video_of_wan22(kind):
    """More channels in than out, two experts or one, a timestep for each token."""
    pipe = wan("WanImageToVideoPipeline", **WAN_IMAGE[kind])
    images = lambda count: {"image": [picture(i) for i in range(count)]}  # noqa: E731
    check(Case(pipe, {**WAN, **GUIDED}, images))


def test_few_steps_are_predicted_to_be_worth_little(fitted):
    case = fitted[0]
    made = [calibrated(case, num_inference_steps=4, computed_steps=computed) for computed in (2, 3)]
    assert made[0].predicted["psnr"] < made[1].predicted["psnr"]
    wanted = calibrated(case, num_inference_steps=4, computed_steps=None, min_psnr=made[1].predicted["psnr"] + 20)
    assert wanted.computed_steps == [0, 1, 2, 3] and wanted.speedup == 1.0


# -- the page --------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@functools.cache
def named_in(file: str) -> list[str]:
    return re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_names_tests_that_exist():
    for thread, _, _, tests in rows():
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named and len(named) == tests.count("`") / 2, thread
        for file, name in named:
            assert name in named_in(file), f"{file}::{name}"
    own = [name for name in named_in("pipelines/test_reports.py") if "the_page" not in name]
    assert all(f"::{name}`" in PAGE for name in own)


def test_each_thread_of_the_page_is_there_once():
    links = [re.fullmatch(r"\[([\w.-]+ #\d+)\]\((\S+)\)", thread) for thread, *_ in rows()]
    assert len(links) >= 34 and all(links) and len({link[2] for link in links if link}) == len(links)
    for link in links:
        owner = re.fullmatch(r"https://github\.com/[\w-]+/([\w.-]+)/(?:issues|pull)/(\d+)", link[2])
        assert owner and link[1] == f"{owner[1]} #{owner[2]}", link[2]
