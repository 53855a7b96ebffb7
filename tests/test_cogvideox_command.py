"""The CogVideoX folder's commands, on a saved pipeline with random weights, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from folder_scripts import exit_code
from mp4 import read_mp4
from tiny_cogvideox import FOLDER, NUM_FRAMES, SIDE, TEXT_TOKENS, cogvideox_pipeline, folder_module

from compare.rivals import Multistep, NotApplicable
from ertacache.cli import settings
from ertacache.errors import UsageError

GENERATE = folder_module("generate")
SIZES = ("--height", str(SIDE), "--width", str(SIDE), "--num-frames", str(NUM_FRAMES))
TEXT = ("--max-sequence-length", str(TEXT_TOKENS))
PLAIN = ("--dtype", "float32", "--vae-tiling", "false")
FAST = (*SIZES, *TEXT, *PLAIN, "--num-inference-steps", "4", "--num-calibration-prompts", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "random-cogvideox"
    cogvideox_pipeline(None).save_pretrained(folder)
    return str(folder)


def run(saved: str, tmp_path: Path, *argv: str) -> dict:
    """`generate.py` in this process; what it wrote to run.json."""
    kept = ("--out", str(tmp_path / "o"), "--calibration-folder", str(tmp_path / "c"))
    GENERATE.main(["--model", saved, *FAST, *kept, "--prompt", "A red circle!", *argv])
    return json.loads((tmp_path / "o" / "run.json").read_text())


def test_generate_writes_a_video_and_the_record(saved, tmp_path, capsys):
    kept = ("--out", str(tmp_path / "o"), "--calibration-folder", str(tmp_path / "c"))
    goal = ("--computed-steps", "2", "--seed", "7", "--compare")
    argv = ("--model", saved, *FAST, *kept, "--prompt", "A red circle!", *goal)
    assert exit_code(FOLDER / "generate.py", *argv) == 0
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["files"] == ["000-a-red-circle.mp4"] and record["seeds"] == [7]
    assert len(record["computed_steps"]) == 2 and record["num_inference_steps"] == 4
    assert record["compare"]["psnr"][0] > 5 and "PSNR" in capsys.readouterr().out
    frames, fps = read_mp4(tmp_path / "o" / record["files"][0])
    assert frames.shape == (NUM_FRAMES, SIDE, SIDE, 3) and fps == 8
    assert [p.name for p in (tmp_path / "c").iterdir()] == [
        f"random-cogvideox-{SIDE}x{SIDE}x{NUM_FRAMES}-n4-g6-ddim-ertacache-k2.json"
    ]
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"000-a-red-circle.mp4", "run.json"}


@pytest.mark.parametrize("method", ["none", "paper", "teacache", "ertacache"])
def test_every_method_runs(saved, tmp_path, method):
    record = run(saved, tmp_path, "--method", method, "--computed-steps", "3", "--num-inference-steps", "6")
    assert record["method"] == method and (tmp_path / "o" / record["files"][0]).stat().st_size > 0


def test_solvers_and_guidance_have_calibrations_of_their_own(saved, tmp_path):
    for argv in ((), ("--solver", "dpm"), ("--dynamic-guidance", "true"), ("--guidance-scale", "1")):
        run(saved, tmp_path, "--computed-steps", "2", *argv)
    names = sorted(p.name.split("-n4-")[1] for p in (tmp_path / "c").iterdir())
    assert names == [
        "g1-ddim-ertacache-k2.json",
        "g6-ddim-dynamic-ertacache-k2.json",
        "g6-ddim-ertacache-k2.json",
        "g6-dpm-ertacache-k2.json",
    ]


def test_wrong_frames_are_one_line_and_exit_code_2(tmp_path, capsys):
    argv = ("--model", "nobody/nothing", "--num-frames", "48", "--out", tmp_path / "o")
    assert exit_code(FOLDER / "generate.py", *argv) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: --num-frames must be 8 n + 1 (9, 17, ... 49), not 48: the VAE drops the frames between"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num-frames", "13"), "8 n"),
        (("--num-frames", "1"), "8 n"),
        (("--height", "20"), "multiple of 8"),
        (("--max-sequence-length", "10"), f"must be {TEXT_TOKENS}"),
        (("--solver", "euler"), "ddim, dpm"),
        (("--fps", "0"), "above 0"),
        (("--video-quality", "11"), "between 0 and 10"),
        (("--speedup", "5"), "between 1 and the number of steps"),
        (("--dynamic-guidance", "maybe"), "true or false"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_bad_values_are_refused(saved, tmp_path, argv, message):
    with pytest.raises(UsageError, match=message):
        run(saved, tmp_path, *argv)
    assert not list(tmp_path.iterdir()) or not list((tmp_path / "o").glob("*"))


def test_tiles_of_the_real_vae_fit_and_those_of_a_small_one_need_not():
    with torch.device("meta"):
        real = AutoencoderKLCogVideoX(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    GENERATE.enable_tiling(real)  # the class defaults are the real sizes
    assert real.use_tiling
    with pytest.raises(UsageError, match="does not fit"):
        GENERATE.enable_tiling(cogvideox_pipeline().vae)


def test_defaults_are_the_official_ones():
    chosen = settings.parse(FOLDER, [], "")
    assert GENERATE.arguments(chosen) == {
        "height": 480,
        "width": 720,
        "num_frames": 49,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": False,
        "max_sequence_length": 226,
    }
    assert (chosen.fps, chosen.dtype, chosen.solver) == (8, "float16", "ddim")


def test_prompt_files_hold_enough_and_never_overlap():
    calibration, held_out = (
        (FOLDER / "prompts" / name).read_text().splitlines() for name in ("calibration.txt", "held_out.txt")
    )
    assert len(calibration) >= 24 and len(held_out) >= 32
    assert len({*calibration, *held_out}) == len(calibration) + len(held_out)
    assert all("moving" in prompt for prompt in [*calibration, *held_out])


def test_the_stochastic_solver_has_no_multistep_counterpart():
    pipe = cogvideox_pipeline("dpm")
    with pytest.raises(NotApplicable, match="multistep solver already"), Multistep().attach(pipe, {"num_steps": 5}):
        pass
