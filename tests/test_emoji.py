"""Emoji as training material: pictures made up here, of one colour each, stand for the packages' own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny_training import emoji, pack, plan, prompts, text
from tiny_training.backdrop import COLOURS, View, background, draw, sample_view
from tiny_training.emoji import EmojiSet, Subject, caption, is_held_out, lively_starts, load_subjects, words
from tiny_training.plan import MAX_TEXT_LENGTH
from tiny_training.sprites import EVERY, SIDE, TONES, load_sprites, tone_of, without_tone

SUBJECTS = [Subject("1f405", "a tiger"), Subject("1f3c3", "a man running", may_mirror=False)]
FRAMES = 40


def disc(colour: tuple[int, int, int], x: float) -> Image.Image:
    """A disc of half the picture's width around `x`, as a share of it, on nothing."""
    across, down = np.meshgrid(np.linspace(0, 1, 256), np.linspace(0, 1, 256))
    inside = (across - x) ** 2 + (down - 0.5) ** 2 < 0.25**2
    return Image.fromarray(np.dstack([*(np.full(inside.shape, c) for c in colour), 255 * inside]).astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    for kind in ("stills", "clips"):
        (folder / kind).mkdir()
    colours = {"1f405": (250, 120, 0), "1f3c3": (250, 210, 60), "1f3c3-1f3ff": (90, 60, 40), "2744-fe0f": (0, 0, 250)}
    for stem, colour in colours.items():
        disc(colour, 0.5).save(folder / "stills" / f"{stem}.webp", lossless=True)
        path = [disc(colour, 0.5 + 0.2 * np.sin(t / 5)) for t in range(FRAMES)]
        path[0].save(folder / "clips" / f"{stem}.webp", save_all=True, append_images=path[1:], lossless=True)
    disc((1, 2, 3), 0.5).save(folder / "clips" / "1f4f7.webp", lossless=True)
    return folder


def test_pictures_are_decoded_once_and_found_by_subject_and_skin_tone(pictures):
    stills = load_sprites(pictures, moving=False)
    assert stills["1f405"].shape == (1, SIDE, SIDE, 4)
    assert stills["1f405"][0, SIDE // 2, SIDE // 2].tolist() == [250, 120, 0, 255] and stills["1f405"][0, 0, 0, 3] == 0
    looks = stills.looks()
    assert looks["1f3c3"] == {None: "1f3c3", "dark": "1f3c3-1f3ff"} and looks["2744"] == {None: "2744-fe0f"}
    clips = load_sprites(pictures, moving=True)
    assert "1f4f7" not in clips.places, "a picture that does not move"
    assert len(clips["1f405"]) == FRAMES // EVERY and not np.array_equal(clips["1f405"][0], clips["1f405"][5])
    assert clips.looks(FRAMES) == {}
    again = load_sprites(pictures, moving=True)
    assert again.places == clips.places and isinstance(again.pixels, np.memmap)


def test_without_pictures_the_error_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack"):
        load_sprites(tmp_path, moving=False)


def test_names_of_files_tell_tone_and_subject():
    assert tone_of("1f3c3-1f3fb-200d-2640-fe0f") == "light" and tone_of("1f405") is None
    assert without_tone("1f3c3-1f3fb-200d-2640-fe0f") == without_tone("1f3c3-200d-2640-fe0f") == "1f3c3-200d-2640"


def test_a_sprite_is_drawn_over_its_background_and_mirrored():
    sprite = np.zeros((1, SIDE, SIDE, 4), dtype=np.uint8)
    sprite[:, :, : SIDE // 2] = (200, 0, 0, 255)
    behind = np.full((32, 32, 3), 0.5, dtype=np.float32)
    drawn = draw(sprite, View(0, 0, SIDE), behind)[0]
    assert drawn[16, 4].tolist() == [200, 0, 0] and drawn[16, 28].tolist() == [128, 128, 128]
    assert np.array_equal(draw(sprite, View(0, 0, SIDE, mirrored=True), behind)[0], drawn[:, ::-1])
    small = draw(sprite, View(-8, -8, SIDE + 16), behind)[0]
    assert small[0, 4].tolist() == [128, 128, 128], "a wider view shows what is beside the sprite"


def test_backgrounds_are_near_the_colour_of_their_name():
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        mean = background(name, rng, 16).mean((0, 1))
        nearest = min(COLOURS, key=lambda other: np.abs(np.asarray(COLOURS[other]) - mean).sum())
        assert nearest == name and np.abs(mean - colour).max() < 0.05


def test_views_show_all_of_the_sprite_and_mirror_only_where_they_may():
    rng = np.random.default_rng(0)
    views = [sample_view(rng, may_mirror=False) for _ in range(200)]
    assert all(v.left <= 0 and v.top <= 0 and v.left + v.side >= SIDE and v.top + v.side >= SIDE for v in views)
    assert not any(v.mirrored for v in views) and any(sample_view(rng, may_mirror=True).mirrored for _ in range(20))


def test_captions_say_what_a_person_would():
    assert caption("a tiger") == "a tiger"
    assert caption("a woman running", "dark", "orange") == "a woman running, dark skin, on an orange background"
    assert words("a t-shirt, on a Blue background") == ["a", "t", "shirt", "on", "a", "blue", "background"]


def test_a_set_of_other_subjects_keeps_its_examples_under_another_name(pictures):
    sprites = load_sprites(pictures, moving=False)
    keys = {EmojiSet("some", sprites, subjects, seed=3).key for subjects in (SUBJECTS, SUBJECTS[::-1], SUBJECTS[:1])}
    assert len(keys) == 3 and EmojiSet("some", sprites, list(SUBJECTS), seed=3).key in keys


def test_examples_are_functions_of_their_number_and_leave_held_out_pairs_out(pictures):
    source = EmojiSet("some", load_sprites(pictures, moving=False), SUBJECTS, seed=3)
    assert np.array_equal(source.pixels(5), source.pixels(5)) and source.pixels(5).shape == source.shape
    assert [source.label(i) for i in range(4)] == [0, 1, 0, 1]
    examples = [source.example(i) for i in range(400)]
    backgrounds = list(COLOURS)
    assert not any(is_held_out(e.subject, backgrounds.index(e.background)) for e in examples)
    assert {e.tone for e in examples if e.subject == 1} == {None, "dark"}
    trained = {c for i in range(400) for c in source.captions(i)}
    held_out = source.held_out(30)
    assert not trained & {prompt for prompt, _ in held_out} and {label for _, label in held_out} == {0, 1}
    known = set(source.vocabulary())
    assert all(set(words(c)) <= known for c in [*trained, *(prompt for prompt, _ in held_out)])


def test_clips_start_where_they_move_most(pictures):
    clips = load_sprites(pictures, moving=True)
    starts = lively_starts(clips["1f405"], 5)

    def change(start: int) -> float:
        first, last = clips["1f405"][start].astype(float), clips["1f405"][start + 4].astype(float)
        return np.abs(last - first).mean()

    others = set(range(len(clips["1f405"]) - 4)) - set(starts.tolist())
    assert min(change(s) for s in starts) > max(change(s) for s in others)
    source = EmojiSet("some", clips, SUBJECTS, seed=3, num_frames=5)
    clip = source.pixels(0)
    assert clip.shape == (5, 64, 64, 3) and np.abs(clip[0].astype(float) - clip[-1]).mean() > 5


@pytest.mark.parametrize("name", ["stills", "clips"])
def test_the_lists_name_every_subject_once_and_their_captions_fit_the_text_length(name):
    subjects, unseen = load_subjects(name), load_subjects("unseen")
    assert len({s.code for s in subjects}) == len({s.phrase for s in subjects}) == len(subjects) > 100
    assert not {s.code for s in subjects} & {s.code for s in unseen}
    assert all(s.phrase == s.phrase.strip().lower() for s in subjects)
    longest = [caption(s.phrase, "medium light", "turquoise") for s in subjects]
    vocabulary = sorted({word for text_ in longest for word in words(text_)})
    tokens = text.tokenize(text.build_tokenizer(MAX_TEXT_LENGTH + 1, vocabulary), longest, MAX_TEXT_LENGTH + 1)
    assert (tokens[:, -1] == 0).all(), "a caption was cut"


def test_autoencoders_see_everything_but_the_unseen(pictures):
    sprites = load_sprites(pictures, moving=False)
    assert [s.code for s in emoji.everything(sprites)] == ["1f3c3", "1f405", "2744"]
    assert set(TONES.values()) == {"light", "medium light", "medium", "medium dark", "dark"}


def test_a_packed_copy_is_the_same_material_in_fewer_bytes(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "load_subjects", lambda name: SUBJECTS if name != "unseen" else [])
    monkeypatch.setattr("sys.argv", ["pack", "--data", str(pictures), "--out", str(tmp_path), "--others", "1"])
    pack.main()
    for moving in (False, True):
        whole, small = load_sprites(pictures, moving), load_sprites(tmp_path, moving)
        assert small.places.keys() == whole.places.keys() and small["1f405"].shape == whole["1f405"].shape
        error = np.abs(small["1f405"].astype(float) - whole["1f405"])[whole["1f405"][..., 3] == 255]
        assert error.mean() < 4


def test_prompts_are_written_for_calibration_and_for_tests(pictures, tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    monkeypatch.setattr(emoji, "load_subjects", lambda name: SUBJECTS)
    command = f"prompts {tmp_path} --data {pictures} --kind stills --calibration 7 --held-out 3"
    monkeypatch.setattr("sys.argv", command.split())
    prompts.main()
    calibration, held_out = (
        (tmp_path / "prompts" / f"{name}.txt").read_text().splitlines() for name in ("calibration", "held_out")
    )
    assert len(set(calibration)) == 7 and len(set(held_out)) == 3 and not set(calibration) & set(held_out)
    source = EmojiSet("stills", load_sprites(pictures, moving=False), SUBJECTS, seed=plan.SEED + plan.TAUGHT)
    assert not set(held_out) & {caption for index in range(400) for caption in source.captions(index)}
