"""Prompt rules, geometry and mask strategies against golden vectors, and their errors."""

import pytest
import torch
from PIL import Image
from tiny_opensora import info_of, names_of

# isort: split
from opensora12 import conditioning, geometry, text
from opensora12.conditioning import MaskRule
from opensora12.html_text import text_of


def cases(kind: str, part: str) -> list:
    return [case for name in names_of(kind) for case in info_of(name)[part]]


# -- captions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("text_preprocessing", "cases"))
def test_cleaning_is_the_original_one(case):
    assert text.clean_caption(case["input"]) == case["output"]
    assert text.clean_caption(case["input"], passes=1) == case["once"]
    assert text.clean_caption(case["input"], passes=0) == case["lower_strip"]


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("a <b>bold</b> word", "a bold word"),
        ("<!-- no --><!DOCTYPE no><?no?>yes<![CDATA[ and yes]]>", "yes and yes"),
        ("a<script>no<b></script>b<style>no</style>c<template>no <i>no</i></template>d", "abcd"),
        ("&lt;&eacute;&#233;&#x2014;&#150;&unknown; &", "<éé——"[:4] + "–&unknown &"),
        ("<b><i>open</b> still", "open still"),
        ("x <![x", "x <![x"),
        ("1 < 2", "1 < 2"),
        ("a &#0; &#x0; &#xD800; &#1114112;", "a � � � �"),
        ("&#129;&#1;", "\x81\x01"),
    ],
)
def test_text_of_markup(markup, expected):
    assert text_of(markup) == expected


@pytest.mark.parametrize("case", cases("inference_utils", "append_score"))
def test_scores_are_appended_as_in_the_original(case):
    arguments = dict(case["args"])
    assert text.append_scores(arguments.pop("prompts"), **arguments) == case["out"]


def test_scores_of_one_prompt_and_cleaning_keeps_them():
    scored = text.append_scores("A Cat", aes=6.5, flow=2, camera_motion="pan left")
    assert text.clean_caption(scored) == "a cat aesthetic score: 6.5. motion score: 2.0. camera motion: pan left."
    assert text.prepare_prompt("|0| A Cat|3|A Dog ", aes=6.5) == (
        "|0|a cat aesthetic score: 6.5.|3|a dog aesthetic score: 6.5."
    )
    assert text.prepare_prompt(" <B>A", clean=False) == "<b>a"


@pytest.mark.parametrize("case", cases("inference_utils", "extract_json"))
def test_json_is_split_off_as_in_the_original(case):
    found = (case["prompts"], case["reference"], case["mask_strategy"])
    assert text.extract_json([case["prompt"]]) == found
    assert text.extract_json(case["prompt"]) == found


def test_json_takes_the_place_of_what_was_given():
    prompts = ["a", 'b {"mask_strategy": "0,1"}']
    assert text.extract_json(prompts, ["r", "s"], ["0", "0"]) == (["a", "b "], ["r", "s"], ["0", "0,1"])


@pytest.mark.parametrize("case", cases("inference_utils", "split_prompt"))
def test_prompts_by_loops_are_split_and_merged_as_in_the_original(case):
    texts, starts = text.split_prompt(case["prompt"])
    assert [texts, starts] == case["out"]
    assert text.merge_prompt(texts, starts) == case["merged"]


@pytest.mark.parametrize("case", cases("inference_utils", "extract_prompts_loop"))
def test_every_loop_gets_its_text(case):
    assert text.prompts_of_loop(case["prompts"], case["loop"]) == case["out"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text.extract_json("a {not json}"), "no JSON object"),
        (lambda: text.extract_json('a {"seed": 1}'), "not 'seed'"),
        (lambda: text.split_prompt("|0|a|b|c"), r"\|0\|text\|2\|text"),
        (lambda: text.split_prompt("|0|a|2"), r"\|0\|text\|2\|text"),
    ],
)
def test_malformed_prompts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- geometry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names_of("aspect_tables"))
def test_every_size_and_length_of_the_tables(name):
    info = info_of(name)
    with pytest.raises(ValueError, match=f"there are {', '.join(info['tables'])}$"):
        geometry.image_size("none", "1:1")
    for resolution, table in info["tables"].items():
        for decimal, size in table.items():
            assert list(geometry.image_size(resolution, decimal)) == size
        for ratio, decimal in info["ratio_names"].items():
            if decimal in table:
                assert list(geometry.image_size(resolution, ratio)) == table[decimal]
    for length, frames in info["num_frames"].items():
        assert geometry.num_frames(length) == frames


def test_landscape_is_the_smaller_number_first():
    assert geometry.image_size("480p", "9:16") == (480, 854)
    assert geometry.image_size("480p", "16:9") == (854, 480)


def test_lengths_and_rates():
    assert [geometry.num_frames(n) for n in (1, "1", 17, "20", 51)] == [1, 1, 17, 20, 51]
    assert geometry.network_fps(51) == 24 and geometry.network_fps(51, 30) == 30 and geometry.network_fps(1, 30) == 120


@pytest.mark.parametrize("frames", [-1, 0, *range(2, 17), "9"])
def test_lengths_that_the_model_cannot_make_are_refused(frames):
    with pytest.raises(ValueError, match=f"num_frames is {frames}: .* 1 frame .* or 17 and more"):
        geometry.num_frames(frames)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry.num_frames("3s"), "'3s' is no number and none of 1x, 2x"),
        (lambda: geometry.image_size("481p", "9:16"), "resolution '481p' is unknown; there are 144p, 240p"),
        (lambda: geometry.image_size("480p", "16:10"), "aspect ratio '16:10' is unknown for 480p; there are 3:8"),
        (lambda: geometry.check_size(63, 64), "height 63 is not a multiple of 8"),
        (lambda: geometry.check_size(64, 100), "width 100 is not a multiple of 8 .nearest: 96 and 104"),
        (lambda: geometry.check_size(0, 64), "height is 0"),
        (lambda: geometry.check_size(64, -8), "width is -8"),
    ],
)
def test_unknown_and_unfit_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("size", "factor"), [((240, 426), 8), ((444, 925), 8), ((64, 64), 8), ((6, 10), 2)])
def test_official_sizes_and_multiples_are_taken(size, factor):
    geometry.check_size(*size, factor)


# -- conditioning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("inference_utils", "parse_mask_strategy"))
def test_mask_strategies_are_read_as_in_the_original(case):
    rules = conditioning.parse_mask_strategy(case["s"])
    assert rules == [MaskRule(*entry) for entry in case["out"]]
    assert conditioning.parse_mask_strategy(";".join(map(str, rules))) == rules


@pytest.mark.parametrize("case", cases("inference_utils", "find_nearest_point"))
def test_positions_are_aligned_as_in_the_original(case):
    assert conditioning.find_nearest_point(*case["args"]) == case["out"]


@pytest.mark.parametrize("name", names_of("inference_utils"))
def test_latent_frames_to_frames(name):
    for latent, frames in info_of(name)["dframe_to_frame"].items():
        assert conditioning.dframe_to_frame(int(latent)) == frames
    with pytest.raises(ValueError, match="7 latent frames"):
        conditioning.dframe_to_frame(7)


def test_references_are_put_where_the_strategy_says():
    noise, reference = torch.zeros(2, 4, 15, 2, 2), torch.arange(10.0)[None, :, None, None].expand(4, 10, 2, 2)
    latents, mask = conditioning.apply_mask_strategy(
        noise, [[reference], []], ["0,0,-5,0,5,0.3;1,0,0,0,1;0,0,0,-5,99", ""], loop=0
    )
    assert latents[0, 0, :, 0, 0].tolist() == [5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    torch.testing.assert_close(mask[0], torch.tensor([0.3] * 5 + [1.0] * 5 + [0.0] * 5))
    assert bool((mask[1] == 1).all()) and not latents[1].any() and not noise.any()
    unaligned = conditioning.apply_mask_strategy(noise, [[reference], []], ["0,0,3,7,2", ""], loop=0, align=None)
    assert unaligned[0][0, 0, 6:10, 0, 0].tolist() == [0, 3, 4, 0]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0,1", "names reference 1, the prompt has 1"),
        ("0,0,-99", "does not fit 10 reference and 15 video"),
        ("0,0,0,0,0", "does not fit"),
        ("x", "one to six numbers"),
        ("0,0,0,0,1,0,9", "one to six numbers"),
    ],
)
def test_strategies_that_do_not_fit_are_refused(strategy, message):
    with pytest.raises(ValueError, match=message):
        conditioning.apply_mask_strategy(torch.zeros(1, 4, 15, 2, 2), [[torch.ones(4, 10, 2, 2)]], [strategy], 0)
    with pytest.raises(ValueError, match="a reference's latents are"):
        conditioning.apply_mask_strategy(torch.zeros(1, 4, 15, 2, 2), [[torch.ones(4, 10, 3, 2)]], ["0"], 0)


def test_pictures_are_scaled_to_cover_and_cut_around_the_middle(tmp_path):
    picture = Image.new("RGB", (40, 10), "black")
    picture.paste("white", (15, 0, 25, 10))
    pixels = conditioning.load_reference(picture, 20, 20)
    assert pixels.shape == (3, 1, 20, 20) and bool((pixels[..., 4:16] > 0.9).all())
    picture.save(tmp_path / "a.png")
    assert torch.equal(conditioning.load_reference(str(tmp_path / "a.png"), 20, 20), pixels)
    assert torch.equal(conditioning.load_reference([picture, picture], 20, 20)[:, 1:], pixels)
    assert conditioning.load_reference(torch.zeros(3, 2, 8, 8), 8, 8).shape == (3, 2, 8, 8)


def test_videos_are_references_too(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    frames = torch.full((4, 32, 32, 3), 200, dtype=torch.uint8).numpy()
    imageio.imwrite(tmp_path / "a.mp4", frames, fps=24)
    pixels = conditioning.load_reference(tmp_path / "a.mp4", 16, 16)
    assert pixels.shape == (3, 4, 16, 16) and float(pixels.mean()) == pytest.approx(200 / 127.5 - 1, abs=0.05)


def test_what_is_no_reference_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    for reference, message in (
        (tmp_path / "no.png", "does not exist"),
        (tmp_path / "a.txt", "is no picture"),
        (torch.zeros(3, 1, 8, 9), r"must be \[3, T, 8, 8\]"),
        ([1], "a reference is"),
    ):
        with pytest.raises(ValueError, match=message):
            conditioning.load_reference(reference, 8, 8)
