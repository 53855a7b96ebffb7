"""The commands of the Open-Sora folder, on a saved pipeline with random weights: the path that real weights take."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from folder_scripts import exit_code
from mp4 import read_mp4
from opensora_folder import folder_modules, pipeline
from PIL import Image
from tiny_opensora import FOLDER, FRAMES, SIDE

from ertacache.cli import command, models, settings
from ertacache.cli.settings import read_constants, read_prompts

SMALL = ["--dtype", "float32", "--height", SIDE, "--width", SIDE, "--num-frames", FRAMES]
FAST = [*SMALL, "--num-inference-steps", 3, "--num-calibration-prompts", 2, "--prompt", "A red cat!"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "random-opensora"
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modules() -> Iterator[dict]:
    with folder_modules() as found:
        yield found


@pytest.fixture(scope="module")
def run(modules) -> Callable[..., int]:
    """generate.py's command within this process, as `run(*argv)` -> exit code."""
    return lambda *argv: command.run(lambda: modules["generate"].main([str(a) for a in argv]))


def test_run_writes_a_video_that_plays_and_the_record(tmp_path, saved, run, capsys):
    out, calibrations = tmp_path / "out", tmp_path / "calibrations"
    goal = ["--computed-steps", 2, "--calibration-folder", calibrations, "--seed", 7, "--out", out]
    assert exit_code(FOLDER / "generate.py", "--model", saved, *FAST, *goal, "--compare") == 0
    record = json.loads((out / "run.json").read_text())
    assert record["files"] == ["000-a-red-cat.mp4"]
    assert {p.name for p in out.iterdir()} == {"000-a-red-cat.mp4", "run.json"}
    frames, fps = read_mp4(out / record["files"][0])
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and fps == 24
    assert len(record["computed_steps"]) == 2 and record["arguments"]["aesthetic_score"] == 6.5
    assert {"psnr", "ssim", "temporal_error"} == set(record["compare"]) and "PSNR" in capsys.readouterr().out
    (file,) = calibrations.iterdir()
    assert file.name == f"random-opensora-{SIDE}x{SIDE}x{FRAMES}-n3-g7-float32-ertacache-k2.json"
    before = file.stat().st_mtime_ns
    assert run("--model", saved, *FAST, *goal) == 0 and file.stat().st_mtime_ns == before


def test_a_picture_is_a_png(tmp_path, saved, run):
    argv = ["--num-frames", 1, "--method", "none", "--out", tmp_path]
    assert run("--model", saved, *FAST, *argv) == 0
    assert Image.open(tmp_path / "000-a-red-cat.png").size == (SIDE, SIDE)


@pytest.mark.parametrize(
    "argv",
    [
        ["--method", "paper", "--threshold", "slow"],
        ["--method", "paper", "--computed-steps", 2],
        ["--method", "teacache", "--threshold", 0.1, "--num-inference-steps", 6],
        ["--guidance-scale", 1, "--computed-steps", 2],
        ["--dtype", "bfloat16", "--computed-steps", 2],
    ],
    ids=["paper-slow", "paper", "teacache", "no guidance", "bfloat16"],
)
def test_other_methods_and_settings_run(tmp_path, saved, run, argv):
    argv = [*argv, "--out", tmp_path / "out", "--calibration-folder", tmp_path / "calibrations"]
    assert run("--model", saved, *FAST, *argv) == 0
    assert (tmp_path / "out" / "000-a-red-cat.mp4").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--nonsense"], 2, "--nonsense"),
        *((["--num-frames", n], 2, f"num_frames is {n}: Open-Sora 1.2 makes 1 frame") for n in (0, 2, 9, 16)),
        (["--num-frames", "3s"], 2, "'3s'"),
        (["--height", 17], 2, "height 17 is not a multiple of 2"),
        (["--resolution", "480p"], 2, "not both"),
        (["--fps", 0], 2, "--fps must be above 0"),
        (["--video-quality", 11], 2, "between 0 and 10"),
        (["--threshold", "quick", "--method", "paper"], 2, "slow, fast or a number"),
        (["--threshold", "slow", "--method", "teacache"], 2, "belongs to --method paper"),
        (["--threshold", "slow"], 2, "--method paper"),
        (["--threshold", "nan", "--method", "paper"], 2, "positive number"),
        (["--model", "./no/such/folder"], 1, "does not exist"),
        (["--calibration", "no-such.json"], 1, "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(tmp_path, saved, run, capsys, argv, code, message):
    argv = argv if "--model" in argv else ["--model", saved, *argv]
    assert run(*FAST, "--out", tmp_path / "out", *argv) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resolution", "99p"], "resolution '99p' is unknown; there are 144p"),
        (["--aspect-ratio", "7:5"], "aspect ratio '7:5' is unknown for 480p; there are"),
        (["--height", 481], "height 481 is not a multiple of 8"),
        (["--num-frames", 8], "num_frames is 8"),
        (["--dtype", "float16"], "--dtype float16 cannot count the 480 x 854 pixels"),
    ],
)
def test_what_the_official_model_cannot_make_is_said_before_it_is_loaded(
    tmp_path, run, capsys, monkeypatch, argv, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("--model", "hpcai-tech/OpenSora-STDiT-v3", *argv, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_weights_name_the_three_downloads(tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--model", "hpcai-tech/OpenSora-STDiT-v3", "--prompt", "a cat"]
    assert exit_code(FOLDER / "generate.py", *argv) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: model hpcai-tech/OpenSora-STDiT-v3 cannot be loaded")
    for name in ("hpcai-tech/OpenSora-STDiT-v3", "hpcai-tech/OpenSora-VAE-v1.2", "DeepFloyd/t5-v1_1-xxl"):
        assert f"`../.venv/bin/hf download {name}`" in last


def test_the_official_layout_loads(tmp_path, saved, run):
    folders = {}
    for name in ("transformer", "vae", "text_encoder"):
        folders[name] = shutil.copytree(saved / name, tmp_path / name)
        for path in folders[name].glob("diffusion_pytorch_model.safetensors"):
            path.rename(path.with_name("model.safetensors"))
    shutil.copytree(saved / "tokenizer", folders["text_encoder"], dirs_exist_ok=True)
    parts = ["--vae-model", folders["vae"], "--text-model", folders["text_encoder"]]
    # the size is checked against the official VAE, which this one is not; it divides both
    size = ["--height", 16, "--width", 16, "--method", "none", "--out", tmp_path / "out"]
    assert run("--model", folders["transformer"], *parts, *FAST, *size) == 0
    assert (tmp_path / "out" / "000-a-red-cat.mp4").exists()


def test_auto_asks_for_all_three_repositories(modules, monkeypatch):
    chosen = settings.parse(FOLDER, [], "")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 2**40}))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: asked.append(a) or "/somewhere")
    assert models.why_not_real(chosen, modules["weights"].needed_files(chosen)) is None
    assert [name for name, _ in asked] == [chosen.real_model, chosen.vae_model, chosen.text_model]


def test_sizes_and_lengths_by_name(modules):
    def resolved(*argv: str):
        chosen = settings.parse(FOLDER, argv, "")
        modules["generate"].check(chosen)
        return chosen.height, chosen.width, chosen.num_frames

    assert resolved() == (480, 854, 51)
    assert resolved("--resolution", "240p") == (240, 426, 51)
    assert resolved("--resolution", "720p", "--aspect-ratio", "1:1", "--num-frames", "4s") == (960, 960, 102)
    assert resolved("--aspect-ratio", "16:9", "--num-frames", "34") == (854, 480, 34)
    assert resolved("--height", "320", "--width", "320") == (320, 320, 51)


def test_presets_are_the_published_thresholds(modules):
    for name, value in (("slow", 0.1), ("fast", 0.18), ("0.3", 0.3)):
        chosen = settings.parse(FOLDER, ["--method", "paper", "--threshold", name], "")
        modules["generate"].check(chosen)
        assert chosen.goal() == ("threshold", value)


def test_defaults_are_the_official_ones(modules):
    chosen = settings.parse(FOLDER, [], "")
    assert modules["generate"].arguments(chosen) == {
        "height": 480,
        "width": 854,
        "num_frames": 51,
        "num_inference_steps": 30,
        "guidance_scale": 7.0,
        "fps": 24.0,
        "aesthetic_score": 6.5,
        "motion_score": None,
        "camera_motion": None,
    }
    assert chosen.dtype == "bfloat16"
    assert set(read_constants(FOLDER / "tiny" / "config.py")) <= set(read_constants(FOLDER / "config.py"))


def test_prompts_are_enough_and_held_out_ones_are_others():
    calibration, held_out, tiny = (
        read_prompts(FOLDER / "prompts" / f"{name}.txt") for name in ("calibration", "held_out", "tiny_examples")
    )
    assert len(calibration) == 32 and len(held_out) == 48 and tiny
    everything = [*calibration, *held_out, *tiny]
    assert len(set(everything)) == len(everything) and all("moving" in prompt for prompt in everything)
    others = [path for path in FOLDER.parent.glob("ERTACache4*/prompts/*.txt") if path.parents[1] != FOLDER]
    assert others and not set(everything) & {prompt for path in others for prompt in read_prompts(path)}
