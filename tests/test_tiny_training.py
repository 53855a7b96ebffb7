"""The trainer of the tiny video pipelines: its pieces in closed form, and both scripts from end to end."""

import math
import runpy
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_pipelines import imports_from

from tiny_training import clips, data, flow, motion, text, video_stages
from tiny_training.arrays import filled_array
from tiny_training.loop import Stage, optimizers_for
from tiny_training.muon import Muon, orthogonalized
from tiny_training.render import render_frame
from tiny_training.scene import DIRECTIONS, PLACES
from tiny_training.video_vae import Crops, _colour_error, draw_crops, set_memory_format

SMALL_FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip

ROOT = Path(__file__).parent.parent
VIDEO_FOLDERS = ["ERTACache4Wan2.1", "ERTACache4CogVideoX"]


def test_an_interrupted_array_is_filled_from_where_it_stopped(tmp_path):
    asked = []

    def fill(start: int, stop: int, broken: bool) -> np.ndarray:
        if broken and start >= 4:
            raise KeyboardInterrupt
        asked.append((start, stop))
        return np.arange(start, stop, dtype="float16")[:, None]

    path = tmp_path / "array.npy"
    with pytest.raises(KeyboardInterrupt):
        filled_array(path, (7, 1), "float16", partial(fill, broken=True), piece=2)
    assert not path.exists()
    array = filled_array(path, (7, 1), "float16", partial(fill, broken=False), piece=2)
    assert asked == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert array[:, 0].tolist() == list(range(7))
    assert [p.name for p in tmp_path.iterdir()] == ["array.npy"]
    with pytest.raises(ValueError, match="delete it"):
        filled_array(path, (8, 1), "float16", partial(fill, broken=False), piece=2)


def test_a_still_is_the_first_frame_of_its_clip():
    clip, still = (data.rendered_clip(3, 5, 32, num_frames) for num_frames in (4, 1))
    assert np.array_equal(clip[:1], still)
    first = render_frame(data.scene_for(3, 5, moving=True), 32)
    assert np.array_equal(still[0], (first * 255 + 0.5).astype(np.uint8))
    assert not np.array_equal(clip[0], clip[-1])


def test_moving_captions_name_directions_and_fit_the_text_length():
    captions = [c for i in range(300) for c in data.captions_for(i, clips.SEED, moving=True)]
    assert {f"moving {name}" for name in DIRECTIONS} <= {
        f"moving {word}"
        for c in captions
        for before, word in zip(c.split(), c.split()[1:], strict=False)
        if before == "moving"
    }
    tokens = text.tokenize(text.build_tokenizer(clips.MAX_TEXT_LENGTH), captions, clips.MAX_TEXT_LENGTH)
    lengths = (tokens != 0).sum(1)
    assert lengths.max() < clips.MAX_TEXT_LENGTH, "a caption was cut"


def test_straight_path_and_its_velocity_meet_both_ends():
    latents, noise = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
    mixed, velocity = flow.straight_path(latents, noise, torch.tensor([0.25, 1.0]))
    assert mixed[0].tolist() == [1.25] * 3 and torch.equal(mixed[1], noise[1])
    assert velocity.tolist() == [[-3.0] * 3] * 2


def test_diffusion_path_is_undone_by_its_prediction():
    alphas = torch.linspace(1, 0, 11, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 3, generator=generator)
    level = torch.tensor([0.0, 0.3, 0.72, 1.0])
    mixed, v = flow.diffusion_path(alphas)(latents, noise, level)
    assert mixed.dtype == torch.float32
    alpha = alphas[[0, 3, 7, 10]].float()[:, None]
    torch.testing.assert_close(alpha.sqrt() * mixed - (1 - alpha).sqrt() * v, latents)
    torch.testing.assert_close((1 - alpha).sqrt() * mixed + alpha.sqrt() * v, noise)


def test_levels_are_shifted_in_the_logit():
    shift = 3.0
    plain = flow.logit_normal_levels(4000, torch.Generator().manual_seed(1), mean=0.0)
    shifted = flow.logit_normal_levels(4000, torch.Generator().manual_seed(1), mean=math.log(shift))
    moved = shifted != plain
    torch.testing.assert_close(shifted[moved], shift * plain[moved] / (1 + (shift - 1) * plain[moved]))
    assert 0.85 < moved.float().mean() < 0.95


def test_a_batch_depends_on_the_step_alone():
    tokens = torch.arange(20).view(10, 1, 2)
    batches = flow.Batches(torch.randn(10, 3).half(), tokens, torch.zeros(1, 2, dtype=torch.long), 4, "cpu")
    for one, other in zip(batches.draw(7, True), batches.draw(7, True), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(batches.draw(7, True)[2], batches.draw(8, True)[2])


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in ((6, 20), (20, 6)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape, generator=torch.Generator().manual_seed(2))))
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_takes_matrices_and_kernels_inside_blocks_alone():
    block = torch.nn.ModuleDict({"conv": torch.nn.Conv3d(2, 2, 3), "to_q": torch.nn.Linear(4, 5)})
    block.register_parameter("scale_shift_table", torch.nn.Parameter(torch.zeros(6, 4)))
    model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv3d(1, 2, 1), "down_blocks": torch.nn.ModuleList([block])})
    others, inner = optimizers_for(model, 1e-2, muon=True)
    assert isinstance(inner, Muon)
    assert {p.shape for p in inner.param_groups[0]["params"]} == {(2, 2, 3, 3, 3), (5, 4)}
    assert len(others.param_groups[0]["params"]) == 5
    assert len(optimizers_for(model, 1e-2)) == 1


def test_muon_descends_in_either_memory_format():
    results = []
    for channels_last in (False, True):
        torch.manual_seed(3)
        model = torch.nn.ModuleDict({"block": torch.nn.Conv3d(2, 3, 3, bias=False)})
        set_memory_format(model, channels_last)
        optimizer = Muon(list(model.parameters()), lr=0.02, weight_decay=0.0)
        pixels, target = torch.randn(4, 2, 3, 3, 3), torch.randn(4, 3, 1, 1, 1)
        losses = []
        for _ in range(30):
            loss = (model["block"](pixels) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append(losses)
    assert results[0][-1] < 0.1 * results[0][0]
    assert results[0] == pytest.approx(results[1], rel=1e-2)


def test_a_wrong_colour_costs_more_than_a_wrong_texture_of_the_same_size():
    """The absolute error alone cannot tell them apart, and leaves an axis of colour out for long."""
    target = torch.zeros(1, 3, 2, 8, 8)
    checkers = torch.tensor([1.0, -1.0]).repeat(4).view(1, 1, 1, 1, 8) * torch.ones_like(target)
    assert _colour_error(target + 0.5, target) == 0.25 and _colour_error(target + 0.5 * checkers, target) == 0


def test_training_goes_on_from_the_parts_of_a_pipeline(tmp_path):
    """With no steps a stage keeps the weights that it starts from."""
    trained, fresh = (FluxTransformer2DModel(**SMALL_FLUX) for _ in range(2))
    trained.save_pretrained(tmp_path / "transformer")
    begun = video_stages.started(fresh, Namespace(start_from=tmp_path), "transformer")
    Stage("flow", begun, lambda step: pytest.fail("a step was made"), 0, 1e-3, tmp_path).run()
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), trained.parameters(), strict=True))
    other = FluxTransformer2DModel(**SMALL_FLUX)
    before = [p.clone() for p in other.parameters()]
    video_stages.started(other, Namespace(start_from=None), "transformer")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))


def test_crops_come_from_the_clips_and_fill_the_frame():
    pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 8, 8, 3), dtype=np.uint8)
    whole = draw_crops(pixels, Crops(1.0, 5, 8, 2), step=4)
    assert all(any(np.array_equal(crop, clip) for clip in pixels) for crop in whole)
    assert draw_crops(pixels, Crops(1.0, 2, 4, 6), step=0).shape == (6, 2, 4, 4, 3)


def test_a_moving_object_follows_its_prompt_only_with_colour_shape_place_and_direction():
    prompts = ["a red star moving left at the top and a blue ring at the bottom", "a red star moving up at the top"]
    places = list(PLACES)

    def see_everything_red_and_star(pixels):
        shapes, colours = torch.zeros(len(pixels), 9, 7), torch.zeros(len(pixels), 9, 9)
        shapes[..., 4] = 1  # star
        colours[..., 1] = 1  # red
        return shapes, colours

    def see_everything_move_left(pixels):
        logits = torch.zeros(len(pixels), len(places), motion.CLASSES)
        logits[..., motion.FIRST_DIRECTION] = 1
        return logits

    seen = motion.clip_adherence(
        see_everything_red_and_star, see_everything_move_left, torch.zeros(2, 3, 5, 8, 8), prompts
    )
    assert seen == {"first_frame": pytest.approx(2 / 3), "motion": 0.5, "all": pytest.approx(1 / 3)}


def test_motion_judge_answers_for_every_place():
    assert motion.seen_frames(17) == [0, 4, 8, 12, 16]
    assert motion.MotionJudge()(torch.rand(2, 3, 9, 64, 64)).shape == (2, 9, 6)


@pytest.mark.parametrize("folder", ["ERTACache4FLUX", *VIDEO_FOLDERS])
def test_training_runs_from_scenes_to_a_measured_pipeline_and_resumes(folder, tmp_path, monkeypatch, capsys):
    def train(*flags: str) -> str:
        """What it says; in this process, since importing everything anew takes ten seconds."""
        script = str(ROOT / folder / "train_tiny.py")
        monkeypatch.setattr(sys, "argv", [script, "--work", str(tmp_path), "--smoke", *flags])
        with imports_from(ROOT / folder):
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().err

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # takes a minute, and changes no result
    assert "vae:   0%" in train()
    made = {p.name for p in (tmp_path / "tiny").iterdir()}
    assert {"model_index.json", "transformer", "vae", "contact_sheet.png", "training.json"} <= made
    assert not list(tmp_path.glob("*.part"))
    stage = "flow" if "FLUX" in folder else "clip"
    assert "vae:   0%" not in train(f"--{stage}-steps", "3"), "a finished stage ran again"
    checkpoint = "flow.pt" if stage == "flow" else "flow-clips.pt"
    assert torch.load(tmp_path / checkpoint, weights_only=True)["step"] == 3


@pytest.mark.parametrize("folder", VIDEO_FOLDERS)
def test_held_out_and_calibration_prompts_follow_the_grammar_and_never_overlap(folder):
    prompts = {
        name: (ROOT / folder / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        for name in ("held_out", "calibration")
    }
    assert not set(prompts["held_out"]) & set(prompts["calibration"])
    text.attribute_targets(prompts["held_out"] + prompts["calibration"])


def test_a_held_out_prompt_among_the_captions_is_refused():
    plan = clips.SMOKE
    seen = data.captions_for(0, clips.SEED, moving=True)[0]
    with pytest.raises(SystemExit, match="held-out prompt"):
        clips.tokenized_captions(text.build_tokenizer(clips.MAX_TEXT_LENGTH), plan, [seen])
