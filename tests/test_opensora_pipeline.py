"""The pipeline end to end at a tiny random size, and with the caching library attached."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_opensora import (
    CAPTION_CHANNELS,
    CAPTION_TOKENS,
    FRAMES,
    LATENT,
    SIDE,
    generator,
    tiny_pipeline,
    tiny_tokenizer,
)
from transformers import T5EncoderModel

import ertacache

# isort: split
from opensora12 import OpenSoraPipeline, OpenSoraVAE, STDiT3
from opensora12.conditioning import load_reference

SMALL = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipe() -> OpenSoraPipeline:
    return tiny_pipeline()


def latents_of(pipe, prompt="a red cat runs", seed=0, **overrides) -> torch.Tensor:
    return pipe(prompt, generator=generator(seed), output_type="latent", **{**SMALL, **overrides}).frames


# -- what comes out --------------------------------------------------------------------------------------


def test_outputs_in_every_form(pipe):
    forms = {
        form: pipe(["a cat", "a dog"], generator=generator(), output_type=form, **SMALL).frames
        for form in ("latent", "pt", "np", "pil")
    }
    assert forms["latent"].shape == (2, 4, *LATENT) and forms["latent"].dtype == torch.float32
    assert forms["pt"].shape == (2, FRAMES, 3, SIDE, SIDE)
    assert forms["pt"].min() >= 0 and forms["pt"].max() <= 1
    assert forms["np"].shape == (2, FRAMES, SIDE, SIDE, 3)
    np.testing.assert_allclose(forms["np"], forms["pt"].permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert len(forms["pil"]) == 2 and len(forms["pil"][0]) == FRAMES
    assert np.abs(np.asarray(forms["pil"][1][3]) / 255 - forms["np"][1, 3]).max() <= 0.51 / 255
    frames = (pipe.vae.decode(forms["latent"], num_frames=FRAMES) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(forms["pt"], frames.transpose(1, 2))


def test_text_to_image(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    picture = pipe("a cat", generator=generator(), output_type="pt", **{**SMALL, "num_frames": 1}).frames
    handle.remove()
    assert picture.shape == (1, 1, 3, SIDE, SIDE)
    assert seen[0]["fps"].tolist() == [120, 120]


def test_same_seed_same_video_and_generators_by_video(pipe):
    assert torch.equal(latents_of(pipe), latents_of(pipe))
    assert not torch.equal(latents_of(pipe), latents_of(pipe, seed=1))
    both = pipe(["a cat", "a dog"], generator=[generator(3), generator(4)], output_type="latent", **SMALL).frames
    torch.testing.assert_close(both[1:], latents_of(pipe, "a dog", seed=4), atol=1e-4, rtol=1e-4)


def test_tuple_and_several_videos_of_a_prompt(pipe):
    result = pipe(
        ["a cat", "a dog"],
        num_videos_per_prompt=2,
        generator=[generator(i) for i in range(4)],
        output_type="latent",
        return_dict=False,
        **SMALL,
    )
    assert isinstance(result, tuple) and result[0].shape[0] == 4
    torch.testing.assert_close(result[0][3:], latents_of(pipe, "a dog", seed=3), atol=1e-4, rtol=1e-4)


def test_run_is_the_original_one_step_by_step(pipe):
    """Written out: captions, guidance with the null caption under the prompt's mask, Euler."""
    noise = torch.randn(1, 4, *LATENT, generator=generator(7))
    made = latents_of(pipe, latents=noise, guidance_scale=3.0)
    tokens = tiny_tokenizer()(
        "a red cat runs aesthetic score: 6.5.", padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        caption = pipe.text_encoder(**tokens).last_hidden_state[:, None]
        null = pipe.transformer.y_embedder.y_embedding[None, None]
        pipe.scheduler.set_timesteps(4, height=SIDE, width=SIDE, num_frames=FRAMES)
        times = [*pipe.scheduler.timesteps.tolist(), 0.0]
        size = {"height": torch.tensor([SIDE]), "width": torch.tensor([SIDE]), "fps": torch.tensor([24.0])}
        z = noise
        for t, following in itertools.pairwise(times):
            cond, uncond = (
                pipe.transformer(z, torch.tensor([t]), y, mask=tokens.attention_mask, **size)[:, :4]
                for y in (caption, null)
            )
            z = z + (uncond + 3.0 * (cond - uncond)) * (t - following) / 1000
    torch.testing.assert_close(made, z, atol=1e-4, rtol=1e-4)


def test_guidance_one_leaves_the_null_caption_out(pipe):
    batches = []
    handle = pipe.transformer.register_forward_hook(lambda _, args, __: batches.append(args[0].shape[0]))
    plain = latents_of(pipe, guidance_scale=1.0)
    guided = latents_of(pipe, guidance_scale=1.0 + 1e-6)
    handle.remove()
    assert batches == [1] * 4 + [2] * 4
    torch.testing.assert_close(plain, guided, atol=1e-3, rtol=1e-3)


def test_embeddings_take_the_place_of_a_prompt(pipe):
    states, mask = pipe.encode_prompt(["a red cat runs aesthetic score: 6.5."])
    for embeds in (states, states[:, 0]):
        made = latents_of(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask)
        assert torch.equal(made, latents_of(pipe))
    without = OpenSoraPipeline(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    without.set_progress_bar_config(disable=True)
    made = latents_of(without, None, prompt_embeds=states, prompt_attention_mask=mask)
    assert torch.equal(made, latents_of(pipe))
    with pytest.raises(ValueError, match="no text encoder"):
        latents_of(without)


def test_resolution_by_name_asks_for_the_size_of_the_table(pipe):
    seen = []

    def stop(_, __, kwargs):
        seen.append(kwargs)
        raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    for arguments in ({}, {"resolution": "144p", "aspect_ratio": "1:1"}):
        with pytest.raises(KeyboardInterrupt):
            pipe("a cat", num_frames=1, num_inference_steps=1, **arguments)
    handle.remove()
    assert [(int(k["height"][0]), int(k["width"][0])) for k in seen] == [(480, 854), (192, 192)]


# -- callbacks -------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_change_the_latents(pipe):
    steps = []

    def zero_at_the_end(p, step, timestep, tensors):
        steps.append((step, float(timestep)))
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    names = ["latents", "prompt_embeds"]
    made = latents_of(pipe, callback_on_step_end=zero_at_the_end, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _ in steps] == [0, 1, 2, 3] and steps[0][1] == pytest.approx(1000)
    assert not made.any()
    with pytest.raises(ValueError, match="not nonsense"):
        latents_of(pipe, callback_on_step_end_tensor_inputs=["nonsense"])


def test_callback_may_change_the_caption_and_interrupt(pipe):
    states, mask = pipe.encode_prompt(["a dog jumps aesthetic score: 6.5. a"])
    first = latents_of(pipe, None, prompt_embeds=states, prompt_attention_mask=mask, num_inference_steps=1)

    def change(p, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1}

    changed = latents_of(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not torch.equal(changed, latents_of(pipe))

    def stop(p, step, timestep, tensors):
        p._interrupt = True
        return {}

    stopped = latents_of(pipe, callback_on_step_end=stop)
    assert not torch.equal(stopped, latents_of(pipe)) and first.shape == stopped.shape
    assert torch.equal(latents_of(pipe), latents_of(pipe))


# -- longer videos and conditioning ----------------------------------------------------------------------


def test_first_frames_of_a_reference_are_kept(pipe):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    made = latents_of(pipe, references=[picture], mask_strategy="0")
    with torch.no_grad():
        kept = pipe.vae.encode(load_reference(picture, SIDE, SIDE)[None], generator(0))
    assert torch.equal(made[:, :, :1], kept)
    assert not torch.equal(made[:, :, 1:], latents_of(pipe)[:, :, 1:])


def test_edit_strength_lets_a_reference_change(pipe):
    reference = torch.rand(3, FRAMES, SIDE, SIDE) * 2 - 1
    first = {}
    for edit in (0.0, 0.5, 1.0):
        made = latents_of(pipe, references=[reference], mask_strategy=f"0,0,0,0,5,{edit}")
        first[edit] = made
    assert not torch.equal(first[0.0], first[0.5]) and not torch.equal(first[0.5], first[1.0])


def test_settings_may_stand_in_the_prompt(pipe, tmp_path):
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "a.png")
    settings = json.dumps({"reference_path": str(tmp_path / "a.png"), "mask_strategy": "0"})
    named = latents_of(pipe, "a red cat runs" + settings)
    given = latents_of(pipe, references=[Image.new("RGB", (SIDE, SIDE), "red")], mask_strategy="0")
    assert torch.equal(named, given)


def test_rule_of_another_loop_leaves_the_run_as_it_is(pipe):
    noise = torch.randn(1, 4, *LATENT, generator=generator(5))
    used = latents_of(pipe, references=[torch.zeros(3, 1, SIDE, SIDE)], mask_strategy="1,0,0,0,5", latents=noise)
    assert torch.equal(used, latents_of(pipe, latents=noise))


LONG = {**SMALL, "num_frames": 34, "num_inference_steps": 2}


def test_loops_continue_each_other(pipe):
    seen = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    video = pipe(
        "|0|a cat|1|a dog", num_loops=3, generator=generator(), output_type="pt", aesthetic_score=None, **LONG
    ).frames
    handle.remove()
    assert video.shape[1] == 34 + 17 + 17
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    first = pipe("a cat", generator=generator(), output_type="pt", aesthetic_score=None, **LONG).frames
    assert torch.equal(video[:, :34], first)


def test_loops_begin_with_the_end_of_the_last_piece(pipe, monkeypatch):
    pieces, handed = [], []
    original = OpenSoraPipeline.denoise

    def watched(self, latents, captions, shape, frame_mask, sampling):
        handed.append((latents.clone(), None if frame_mask is None else frame_mask.mask))
        pieces.append(original(self, latents, captions, shape, frame_mask, sampling))
        return pieces[-1]

    monkeypatch.setattr(OpenSoraPipeline, "denoise", watched)
    latents = latents_of(pipe, num_loops=2, **{**LONG, "condition_frame_edit": 0.25})
    assert latents.shape[2] == 10 + 5
    assert handed[0][1] is None
    assert handed[1][1].tolist() == [[0.25] * 5 + [1.0] * 5]
    assert torch.equal(latents, torch.cat([pieces[0], pieces[1][:, :, 5:]], dim=2))
    kept = latents_of(pipe, num_loops=2, **LONG)
    assert torch.equal(pieces[3][:, :, :5], handed[3][0][:, :, :5]) and kept.shape == latents.shape


# -- what does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 9}, "num_frames is 9"),
        ({"num_frames": "3s"}, "'3s'"),
        ({"height": 17}, "height 17 is not a multiple of 2"),
        ({"height": None}, "height and width, or neither"),
        ({"resolution": "480p"}, "not both"),
        ({"height": None, "width": None, "resolution": "9p"}, "resolution '9p' is unknown"),
        ({"height": None, "width": None, "aspect_ratio": "9:9"}, "aspect ratio '9:9' is unknown"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"output_type": "jpg"}, "output_type 'jpg'"),
        ({"latents": torch.zeros(1, 4, 5, 8, 9)}, r"must be \[1, 4, 5, 8, 8\]"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ({"prompt": None}, "give prompt or prompt_embeds"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 12)}, r"must be \[n, 10, 12\]"),
        ({"prompt": ["a", "b"], "references": [[]]}, "references has 1 entries for 2 prompts"),
        ({"mask_strategy": "0"}, "names reference 0, the prompt has 0"),
        ({"num_loops": 0}, "num_loops is 0"),
        ({"num_loops": 2}, "17 frames have 5 latent frames, too few"),
        ({"num_loops": 2, "num_frames": 34, "condition_frame_length": 3}, "multiple of 5"),
    ],
)
def test_one_clear_error(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", **SMALL, **arguments})


# -- saving, dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folder_loads_and_generates_the_same(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    loaded = OpenSoraPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == dtype
    assert type(loaded.scheduler) is type(pipe.scheduler)
    made = loaded("a cat", generator=generator(), output_type="pt", **SMALL).frames
    reference = tiny_pipeline().to(dtype)("a cat", generator=generator(), output_type="pt", **SMALL).frames
    assert torch.equal(made, reference) and made.dtype == torch.float32


def test_official_repositories_make_a_pipeline(pipe, tmp_path):
    for name in ("transformer", "vae", "text_encoder"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
        for path in (tmp_path / name).glob("diffusion_pytorch_model.safetensors"):
            path.rename(path.with_name("model.safetensors"))
    pipe.tokenizer.save_pretrained(tmp_path / "text_encoder")
    folders = [str(tmp_path / name) for name in ("transformer", "vae", "text_encoder")]
    made = OpenSoraPipeline.from_official(*folders, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    assert isinstance(made.transformer, STDiT3) and isinstance(made.vae, OpenSoraVAE)
    assert isinstance(made.text_encoder, T5EncoderModel)
    assert torch.equal(latents_of(made), latents_of(pipe))


def test_offloading_order_names_every_model(pipe):
    assert pipe.model_cpu_offload_seq == "text_encoder->transformer->vae"


def test_captions_have_the_networks_length(pipe):
    states, mask = pipe.encode_prompt(["a cat", "a " * 99])
    assert states.shape == (2, 1, CAPTION_TOKENS, CAPTION_CHANNELS)
    assert mask.sum(dim=1).tolist() == [3, CAPTION_TOKENS]


# -- the caching library ---------------------------------------------------------------------------------

PROMPTS = ["a red cat", "a dog runs and jumps"]
RUN = {**SMALL, "num_inference_steps": 8}


def test_library_attaches_and_every_step_computed_is_exact(pipe):
    reference = latents_of(pipe, **RUN)
    made = ertacache.calibrate(pipe, PROMPTS, seeds=range(2), computed_steps=8, progress=False, **RUN)
    with ertacache.apply(pipe, made):
        assert torch.equal(latents_of(pipe, **RUN), reference)
    assert torch.equal(latents_of(pipe, **RUN), reference)


@pytest.mark.parametrize("method", ["ertacache", "paper"])
def test_library_skips_steps_and_stays_near(pipe, method):
    reference = latents_of(pipe, PROMPTS[0], **RUN)
    made = ertacache.calibrate(pipe, PROMPTS, seeds=range(2), computed_steps=5, method=method, progress=False, **RUN)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with ertacache.apply(pipe, made):
        cached = latents_of(pipe, PROMPTS[0], **RUN)
    handle.remove()
    assert len(calls) == len(made.computed_steps) <= 5
    assert (cached - reference).norm() / reference.norm() < 0.5
