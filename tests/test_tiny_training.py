"""The trainer of the tiny pipelines: its pieces in closed form, and the scripts from end to end on drawn scenes."""

import itertools
import math
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_pipelines import imports_from

from tiny_training import flow, judge, loop, plan, text, train_all
from tiny_training.arrays import filled_array
from tiny_training.lessons import Lessons
from tiny_training.loop import Stage, optimizers_for, small_checkpoints
from tiny_training.muon import Muon, orthogonalized
from tiny_training.plan import SMOKE, as_far_as_trained
from tiny_training.sources import SceneSet, rendered
from tiny_training.vae import finished_vae, reconstruction_loss
from tiny_training.video_vae import Crops, draw_crops, set_memory_format

ROOT = Path(__file__).parent.parent


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


def test_drawn_scenes_move_and_are_kept(tmp_path):
    source = SceneSet(5, size=32, num_frames=4)
    pixels = rendered(source, 3, tmp_path)
    assert pixels.shape == (3, 4, 32, 32, 3) and np.array_equal(pixels[2], source.pixels(2))
    assert not np.array_equal(pixels[2, 0], pixels[2, -1])
    words = {word for index in range(50) for caption in source.captions(index) for word in caption.split()}
    assert words <= set(source.vocabulary())
    still = SceneSet(5, size=32)
    assert np.array_equal(still.pixels(2)[0], pixels[2, 0]), "a still is the first frame of its clip"


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
    tokens = torch.full((10, 1, 500), 7)
    batches = flow.Batches(torch.randn(10, 3).half(), tokens, torch.ones(1, 500, dtype=torch.long), 400, "cpu")
    rows = batches.draw(0, True)[1]
    empty = (rows == 1).all(1)
    assert 0.06 < empty.float().mean() < 0.18 and 0.02 < (rows[~empty] == text.UNKNOWN_ID).float().mean() < 0.04
    assert (batches.draw(0, False)[1] == 7).all()


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in ((3, 6, 20), (3, 20, 6)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        values = torch.linalg.svdvals(orthogonalized(matrices))
        assert values.min() > 0.6 and values.max() < 1.3
        torch.testing.assert_close(orthogonalized(matrices[1:2]), orthogonalized(matrices)[1:2])


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


def test_the_reconstruction_loss_is_that_of_its_parts_in_closed_form():
    """A picture off by 0.5 has no wrong edges; one off by 0.5 in checkers has them everywhere."""
    target = torch.zeros(1, 3, 8, 8)
    checkers = torch.tensor([1.0, -1.0]).repeat(4) * torch.ones_like(target)
    flat, edged = reconstruction_loss(target + 0.5, target), reconstruction_loss(target + 0.5 * checkers, target)
    assert flat == pytest.approx(0.5 + 4 * 0.25) and edged == pytest.approx(flat + 0.5 * 1.0)


def test_a_prolonged_stage_goes_on_at_the_same_rate_until_its_last_part():
    short, long = (loop.learning_rate_factor(7000, 1 - 7000 / steps) for steps in (10_000, 100_000))
    assert short == long == pytest.approx((loop.HOLD_STEPS / 7001) ** 0.5)
    assert loop.learning_rate_factor(9_999, 1e-4) < 1e-3 and loop.learning_rate_factor(0, 1.0) < 0.01
    assert loop.learning_rate_factor(5000, 1.0, fresh=5000) < 0.01, "fresh optimisers warm up"


def test_a_stage_of_no_steps_leaves_the_model_and_one_resumes_where_it_was(tmp_path):
    model = torch.nn.Linear(1, 1)
    before = model.weight.item()
    Stage("none", model, lambda step: pytest.fail("a step was made"), 0, 1e-3, tmp_path).run()
    assert model.weight.item() == before
    seen = []

    def loss(step: int) -> torch.Tensor:
        seen.append(step)
        return model.weight.square().sum()

    for steps in (2, 5):
        Stage("line", model, loss, steps, 1e-3, tmp_path).run()
    assert seen == [0, 1, 2, 3, 4]
    torch.save({"step": 2}, tmp_path / "flow-stills.pt")
    trained = as_far_as_trained(SMOKE, tmp_path)
    assert (trained.still_steps, trained.clip_steps, trained.vae_steps) == (2, 0, 0)


def test_a_stage_ends_by_the_clock_and_is_gone_on_with_from_a_small_checkpoint(tmp_path, monkeypatch):
    """Every step takes a second of a made-up clock, ten until the end; the rate falls over the last one and a half."""
    now, model, rates = [100.0], torch.nn.Linear(1, 1), []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    factor = loop.learning_rate_factor
    monkeypatch.setattr(loop, "learning_rate_factor", lambda *given: rates.append(given[1:]) or factor(*given))

    def loss(step: int) -> torch.Tensor:
        now[0] += 1
        return model(torch.ones(1)).square().sum()

    work, out = tmp_path / "work", tmp_path / "out"
    with small_checkpoints(work, out):
        Stage("flow-stills", model, loss, 3, 1e-3, work, until=110.0).run()
    assert [left for left, _ in rates] == pytest.approx([1 - i / 10 for i in range(10)])
    small = torch.load(out / "flow-stills.pt", weights_only=True)
    assert set(small) == {"step", "average"} and small["step"] == 10
    assert {value.dtype for value in small["average"].values()} == {torch.float16}
    rates.clear()
    Stage("flow-stills", model, loss, 3, 1e-3, out, until=113.0).run()
    assert [fresh for _, fresh in rates] == [10] * 3, "the optimisers begin anew, and the rate with them"
    assert torch.load(out / "flow-stills.pt", weights_only=True)["step"] == 13
    Stage("flow-stills", model, loss, 3, 1e-3, out, until=113.0).run()
    assert torch.load(out / "flow-stills.pt", weights_only=True)["step"] == 13, "no time, no step"


def test_what_is_packed_is_as_much_as_fits_and_nearly_exact(tmp_path):
    latents = {"stills": torch.randn(900, 4, 8).half(), "clips": torch.randn(900, 3, 4, 8).half()}
    tokens = {name: torch.randint(0, 900, (900, 2, 5)) for name in latents}
    lessons, path = Lessons(latents, tokens, torch.ones(1, 5, dtype=torch.long), 900), tmp_path / "a.safetensors"
    limit = 2**16 + 40_000
    lessons.write(path, limit)
    found = Lessons.read(path)
    assert limit - 2**16 - 500 < path.stat().st_size <= limit and found.vocabulary == 900
    assert torch.equal(found.empty, lessons.empty)
    for name, part in found.latents.items():
        count = len(part)
        assert 100 < count < 900 and part.dtype == torch.float16
        assert torch.equal(found.tokens[name], tokens[name][:count])
        assert (part - latents[name][:count]).abs().max() < 0.5 * 4.5 / 127 + 2e-3
    lessons.write(path)
    assert {name: len(part) for name, part in Lessons.read(path).latents.items()} == {"stills": 900, "clips": 900}


def test_a_finished_autoencoder_must_make_the_latents_that_the_transformer_is_for(tmp_path):
    def autoencoder(channels: int, width: int) -> AutoencoderKL:
        return AutoencoderKL(block_out_channels=(width,), latent_channels=channels, norm_num_groups=2)

    autoencoder(2, 4).save_pretrained(tmp_path)
    assert finished_vae(autoencoder(2, 8), tmp_path, 1, 3, 8, 8).config.block_out_channels == [4]
    with pytest.raises(SystemExit, match=r"makes latents \(1, 2, 8, 8\).* for \(1, 3, 8, 8\)"):
        finished_vae(autoencoder(3, 4), tmp_path, 1, 3, 8, 8)


def test_a_model_that_does_not_compile_is_trained_as_it_is(monkeypatch, capsys):
    model = torch.nn.Linear(2, 1)
    before = torch.get_float32_matmul_precision()

    def loss(ask, step):
        return ask(torch.ones(2)).sum()

    def broken(_, **__):
        return lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler"))

    monkeypatch.setattr(torch, "compile", broken)
    try:
        ready = flow._compiled_loss(loss, (model,), "cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    assert "no compiler" in capsys.readouterr().out
    ready(0).backward()
    assert model.weight.grad is not None
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    ready = flow._compiled_loss(loss, (model,), "cpu")
    assert torch.equal(ready(1), loss(model, 1))


def test_crops_come_from_the_clips_and_fill_the_frame():
    pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 8, 8, 3), dtype=np.uint8)
    whole = draw_crops(pixels, Crops(1.0, 5, 8, 2), step=4)
    assert all(any(np.array_equal(crop, clip) for clip in pixels) for crop in whole)
    assert draw_crops(pixels, Crops(1.0, 2, 4, 6), step=0).shape == (6, 2, 4, 4, 3)


def test_a_subject_is_recognised_among_the_first_guesses_of_all_frames_together():
    """Two frames vote: the first is sure of 3, the second of 1; label 2 is third, others follow."""
    votes = torch.tensor([[0.0, 1.0, 4.0, 9.0, -1.0], [0.0, 9.0, 4.0, 1.0, -1.0]])
    pixels = torch.zeros(1, 3, 2, 8, 8)

    def guess(frames: torch.Tensor) -> torch.Tensor:
        return votes

    shares = [judge.recognised(guess, pixels, [2], among=5, first=first) for first in (1, 2, 3)]
    assert shares == [0.0, 0.0, 1.0]
    assert judge.recognised(guess, pixels, [0], among=2, first=2) == 1.0
    assert judge.Judge(7)(torch.rand(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("folder", train_all.FOLDERS.values())
def test_training_runs_from_scenes_to_a_measured_pipeline_and_resumes(folder, tmp_path, monkeypatch, capsys):
    def train(*flags: str, work: Path = tmp_path) -> str:
        """What it says; in this process, since importing everything anew takes ten seconds."""
        script = str(ROOT / folder / "train_tiny.py")
        monkeypatch.setattr(sys, "argv", [script, "--smoke", *flags, "--work", str(work)])
        with imports_from(ROOT / folder):
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().err

    stage, steps = ("stills", "--still-steps") if "FLUX" in folder else ("clips", "--clip-steps")
    assert f"flow-{stage}:   0%" in train()
    made = {p.name for p in (tmp_path / "tiny").iterdir()}
    assert {"model_index.json", "transformer", "vae", "contact_sheet.png", "training.json"} <= made
    assert not list(tmp_path.glob("*.part"))
    first = "vae-temporal" if "Sora" in folder else "vae"
    assert f"{first}:   0%" not in train(steps, "3"), "a finished stage ran again"
    assert torch.load(tmp_path / f"flow-{stage}.pt", weights_only=True)["step"] == 3

    if folder not in (train_all.FOLDERS["flux"], train_all.FOLDERS["wan"]):  # the rest is the same for all videos
        return
    packed, away = tmp_path / "packed.safetensors", tmp_path / "away"
    finished = ["--vae", str(ROOT / folder / "tiny/vae")] if stage == "stills" else []
    train("--pack", str(packed), *finished)
    clock = itertools.count(0, 10)  # of the training alone: ten seconds a look
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(plan, "time", loop.time)
    given = ["--packed", str(packed), "--minutes", "2", "--device", "cpu", "--still-batch", "2", "--clip-batch", "2"]
    if folder == train_all.FOLDERS["flux"]:  # as the script calls it
        words = ["sh", str(ROOT / "bench/train_gpu.sh"), "flux", "2", str(packed), str(away), *given[4:]]
        said = subprocess.run(words, env={**os.environ, "PYTHON": "echo"}, capture_output=True, text=True, check=True)
        program, *given = said.stdout.split()
        assert program == "train_tiny.py" and given[:2] == ["--packed", str(packed)]
    train(*given, "--batch-factor", "1", work=away)
    made = list((away / "small").iterdir())
    assert f"flow-{stage}.pt" in {p.name for p in made} and sum(p.stat().st_size for p in made) < 16 * 2**20
    steps = torch.load(away / "small" / f"flow-{stage}.pt", weights_only=True)["step"]
    assert steps > 0
    if stage == "stills":
        train(*given, "--batch-factor", "1", work=away / "small")
        assert torch.load(away / "small" / f"flow-{stage}.pt", weights_only=True)["step"] > steps, "it did not go on"


def test_turns_go_round_until_everything_is_finished(tmp_path, monkeypatch):
    """Three pipelines that need two turns each, in one lane; one waits for what another makes."""
    monkeypatch.setattr(train_all, "ROOT", tmp_path)
    script = "import pathlib, sys, time; work = pathlib.Path(sys.argv[4]); work.mkdir(exist_ok=True)\n"
    script += "with open(work.parent / 'turns', 'a') as turns: turns.write(work.name + ' ')\n"
    script += "mark = work / 'vae'\nif not mark.exists(): mark.touch(); time.sleep(60)\n"
    for name in ("opensora", "flux", "wan"):
        (tmp_path / train_all.FOLDERS[name]).mkdir()
        (tmp_path / train_all.FOLDERS[name] / "train_tiny.py").write_text(script)
    args = Namespace(data=tmp_path, work=tmp_path, lanes=1, turn=2, flags=[])
    turns = train_all.Turns(["opensora", "flux", "wan"], args)
    turns.lane()
    assert not turns.waiting and not turns.running
    assert (tmp_path / "turns").read_text().split() == ["flux", "opensora", "wan", "flux", "opensora", "wan"]
