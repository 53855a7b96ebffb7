"""The commands of the Wan2.1 folder, on a saved pipeline with random weights: the path that real weights take."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folder_scripts import exit_code
from mp4 import read_mp4
from tiny_wan import wan_pipeline

from ertacache.cli import command
from ertacache.cli.settings import read_constants, read_prompts

FOLDER = Path(__file__).parents[1] / "ERTACache4Wan2.1"
MODULES = ("generate", "scheduler", "transformer")  # names that every folder has
SMALL = ["--dtype", "float32", "--height", "32", "--width", "48", "--num-frames", "5", "--max-sequence-length", "20"]
FAST = [*SMALL, "--num-inference-steps", "4", "--num-calibration-prompts", "2", "--prompt", "A red circle!"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., int]]:
    """generate.py's command within this process, as `run(*argv)` -> exit code: importing it anew takes seconds."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(FOLDER))
    module = importlib.import_module("generate")
    yield lambda *argv: command.run(lambda: module.main([str(a) for a in argv]))
    sys.path.remove(str(FOLDER))
    for name, kept in before.items():
        sys.modules.pop(name)
        if kept is not None:
            sys.modules[name] = kept


def test_run_writes_videos_that_play_and_the_record(tmp_path, saved, run, capsys):
    out, calibrations = tmp_path / "out", tmp_path / "calibrations"
    goal = ["--computed-steps", "2", "--calibration-folder", calibrations]
    argv = ["--model", saved, *FAST, *goal, "--seed", "7", "--compare", "--out", out]
    assert exit_code(FOLDER / "generate.py", *argv) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert record["files"] == ["000-a-red-circle.mp4"] and {p.name for p in out.iterdir()} == {
        "000-a-red-circle.mp4",
        "run.json",
    }
    frames, fps = read_mp4(out / record["files"][0])
    assert frames.shape == (5, 32, 48, 3) and fps == 16
    assert len(record["computed_steps"]) == 2 and record["arguments"]["num_frames"] == 5
    assert record["arguments"]["negative_prompt"].startswith("色调艳丽")
    assert {name: len(values) for name, values in record["compare"].items()} == dict.fromkeys(
        ("psnr", "ssim", "temporal_error"), 1
    )
    assert "PSNR" in said and "temporal error" in said
    (file,) = calibrations.iterdir()
    assert file.name.endswith("-48x32x5-n4-g5-unipc-official-shift5-ertacache-k2.json")
    before = file.stat().st_mtime_ns
    assert run("--model", saved, *FAST, *goal, "--seed", "7", "--out", out) == 0
    assert file.stat().st_mtime_ns == before
    # another grid is another calibration, not a mismatch
    assert run("--model", saved, *FAST, *goal, "--grid", "diffusers", "--out", out) == 0
    assert len(list(calibrations.iterdir())) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--method", "none"],
        ["--method", "paper", "--computed-steps", "3"],
        ["--method", "teacache", "--threshold", "0.1"],
        ["--solver", "euler", "--guidance-scale", "1", "--computed-steps", "2"],
        ["--solver", "dpm++", "--computed-steps", "2"],
    ],
    ids=["none", "paper", "teacache", "euler", "dpm++"],
)
def test_other_methods_and_solvers_run(tmp_path, saved, run, argv):
    argv = [*argv, "--out", tmp_path / "out", "--calibration-folder", tmp_path / "calibrations"]
    assert run("--model", saved, *FAST, *argv) == 0
    assert (tmp_path / "out" / "000-a-red-circle.mp4").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--nonsense"], 2, "--nonsense"),
        (["--height", "40"], 2, "multiple of 16"),
        (["--num-frames", "16"], 2, "4 n + 1"),
        (["--solver", "heun"], 2, "unipc, dpm++, euler"),
        (["--grid", "new"], 2, "official, diffusers"),
        (["--flow-shift", "0"], 2, "--flow-shift must be above 0"),
        (["--video-quality", "11"], 2, "between 0 and 10"),
        (["--model", "./no/such/folder"], 1, "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (["--calibration", "no-such.json"], 1, "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(tmp_path, saved, run, capsys, argv, code, message):
    argv = argv if "--model" in argv else ["--model", saved, *argv]
    assert run(*FAST, "--out", tmp_path / "out", *argv) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_missing_weights_say_what_to_download(tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert exit_code(FOLDER / "generate.py", *FAST, *argv) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: model Wan-AI/Wan2.1-T2V-1.3B-Diffusers cannot be loaded")
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in last


def test_defaults_are_the_official_ones():
    constants = {name: value for name, (value, _) in read_constants(FOLDER / "config.py").items()}
    official = {
        "width": 832,
        "height": 480,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "flow_shift": 5.0,
        "max_sequence_length": 512,
        "solver": "unipc",
        "grid": "official",
    }
    assert {name: constants[name] for name in official} == official
    negative = constants["negative_prompt"]
    assert negative.startswith("色调艳丽，过曝，静态，") and negative.endswith("倒着走") and len(negative) == 137
    assert set(read_constants(FOLDER / "tiny" / "config.py")) <= set(constants)


def test_prompts_are_enough_and_held_out_ones_are_others():
    calibration, held_out, tiny = (
        read_prompts(FOLDER / "prompts" / f"{name}.txt") for name in ("calibration", "held_out", "tiny_examples")
    )
    assert len(calibration) >= 24 and len(held_out) >= 32 and tiny
    assert len(set(calibration) | set(held_out) | set(tiny)) == len(calibration) + len(held_out) + len(tiny)
    for prompts in (calibration, held_out, tiny):
        assert sum("moving" in prompt for prompt in prompts) > 0.7 * len(prompts)
