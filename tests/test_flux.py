"""The FLUX folder: the embedded pipeline is exact, accelerated well, and its commands do what they say."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from folder_scripts import exit_code
from PIL import Image
from tiny_pipelines import tiny_module

import ertacache
from compare.recorded import linear_extrapolation, plain_calibration, recorded_runs
from ertacache.calibration import calibration_fields
from ertacache.cli import command
from ertacache.fit.published import fit_published
from ertacache.metrics import psnr

FOLDER = Path(__file__).parents[1] / "ERTACache4FLUX"
ARGUMENTS = {"height": 64, "width": 64, "num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 40}
STEPS = 14


def prompts_in(name: str, count: int) -> list[str]:
    return (FOLDER / "prompts" / name).read_text().splitlines()[:count]


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(FOLDER / "tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, **overrides) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(500 + i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, output_type="pt", **{**ARGUMENTS, **overrides}).images


def test_all_steps_computed_is_bit_identical_and_so_is_the_pipeline_afterwards(pipe):
    prompts = prompts_in("held_out.txt", 2)
    reference = sample(pipe, prompts, num_inference_steps=6)
    made = ertacache.calibrate(
        pipe,
        prompts_in("calibration.txt", 2),
        computed_steps=6,
        progress=False,
        **{**ARGUMENTS, "num_inference_steps": 6},
    )
    with ertacache.apply(pipe, made):
        assert torch.equal(sample(pipe, prompts, num_inference_steps=6), reference)
    assert torch.equal(sample(pipe, prompts, num_inference_steps=6), reference)


def test_margins_over_reuse_extrapolation_and_the_paper(pipe):
    """On fewer prompts than docs/log.md, so with room to the margins measured there."""
    runs = recorded_runs(pipe, prompts_in("calibration.txt", 4), seeds=range(4), **ARGUMENTS)
    kwargs = {"seeds": range(4), "computed_steps": STEPS, "progress": False, **ARGUMENTS}
    ours = ertacache.calibrate(pipe, runs.prompts, effort="fast", **kwargs)
    paper = ertacache.calibrate(pipe, runs.prompts, effort="fast", method="paper", **kwargs)
    prompts = prompts_in("held_out.txt", 4)
    reference = sample(pipe, prompts)

    def quality(calibration) -> float:
        with ertacache.apply(pipe, calibration):
            return float(psnr(sample(pipe, prompts), reference).mean())

    mine = quality(ours)
    schedule = ours.computed_steps
    residuals = asdict(fit_published(runs.record, schedule=schedule, adjust=False, error_model=False))
    lines = calibration_fields(linear_extrapolation(runs.record, schedule))
    assert mine > quality(plain_calibration(runs, "paper", **residuals)) + 8
    assert mine > quality(plain_calibration(runs, "ertacache", computed_steps=schedule, **lines)) + 4
    assert mine > quality(paper) + 6


def test_checked_in_calibrations_belong_to_the_checked_in_pipeline(pipe):
    files = sorted((FOLDER / "calibration").glob("tiny-*.json"))
    assert len(files) >= 1
    for path in files:
        with ertacache.apply(pipe, path) as applied:
            assert applied.calibration.predicted["psnr"] > 20


def test_another_resolution_is_warned_of_and_another_grid_refused(pipe):
    """The tiny pipeline has the grid of 1024 x 1024 pixels at any size; the real one's moves with the size."""
    path = next(iter(sorted((FOLDER / "calibration").glob("tiny-*.json"))))
    with ertacache.apply(pipe, path), pytest.warns(ertacache.MismatchWarning, match="latents are"):
        sample(pipe, prompts_in("held_out.txt", 1), height=48, width=48)
    with ertacache.apply(pipe, path), pytest.raises(ertacache.MismatchError, match="noise grid differs"):
        sample(pipe, prompts_in("held_out.txt", 1), sigmas=torch.linspace(1, 0.1, 28).tolist())


def test_tiny_pipeline_is_small():
    assert sum(f.stat().st_size for f in (FOLDER / "tiny").rglob("*") if f.suffix != ".png") < 10e6


# -- the command -----------------------------------------------------------------------------------------


def as_users_do(script: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, FOLDER / script, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def run(*argv: str) -> int:
    """generate.py's command within this process; its exit code. Importing everything anew takes ten seconds."""
    return command.run(lambda: tiny_module("flux").main(list(argv)))


FAST = ("--model", "tiny", "--num-inference-steps", "6", "--num-calibration-prompts", "2", "--prompt", "A red circle!")


def test_run_writes_pictures_and_the_record(tmp_path):
    calibrations = tmp_path / "calibrations"
    done = as_users_do(
        "generate.py",
        *FAST,
        "--computed-steps",
        "3",
        "--seed",
        "7",
        "--compare",
        "--out",
        str(tmp_path / "o"),
        "--calibration-folder",
        str(calibrations),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["files"] == ["000-a-red-circle.png"] and record["seeds"] == [7]
    assert len(record["computed_steps"]) == 3 and record["num_inference_steps"] == 6
    assert record["compare"]["psnr"][0] > 15 and "PSNR" in done.stdout
    assert np.asarray(Image.open(tmp_path / "o" / record["files"][0])).shape == (64, 64, 3)
    assert len(list(calibrations.iterdir())) == 1
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"000-a-red-circle.png", "run.json"}


@pytest.mark.parametrize("method", ["none", "paper", "teacache"])
def test_other_methods_run(tmp_path, method):
    kept = ("--out", str(tmp_path / "o"), "--calibration-folder", str(tmp_path / "c"))
    assert run(*FAST, *kept, "--method", method, "--computed-steps", "4") == 0
    assert json.loads((tmp_path / "o" / "run.json").read_text())["method"] == method


def test_each_definition_of_the_adjustment_is_kept_under_a_name_of_its_own(tmp_path):
    kept = ("--out", str(tmp_path / "o"), "--calibration-folder", str(tmp_path / "c"))
    for over in ("output", "change"):
        assert run(*FAST, *kept, "--method", "paper", "--computed-steps", "4", "--phi-over", over) == 0
    assert sorted(p.stem.split("-g3.5-")[1] for p in (tmp_path / "c").iterdir()) == ["paper-change-k4", "paper-k4"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--nonsense"], 2, "--nonsense"),
        (["--height", "63"], 2, "multiple of 8"),
        (["--method", "paper", "--phi-over", "both"], 2, "--phi-over must be one of output, change"),
        (["--model", "./no/such/folder"], 1, "does not exist"),
        (["--calibration", "no-such.json"], 1, "cannot be read"),
        (["--calibration", "TRUNCATED"], 1, "not valid JSON"),
        (["--calibration", "CHECKED_IN"], 1, "28"),
    ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(tmp_path, capsys, argv, code, message):
    checked_in = next(iter(sorted((FOLDER / "calibration").glob("tiny-*.json"))))
    truncated = tmp_path / "truncated.json"
    truncated.write_text(checked_in.read_text()[:300])
    argv = [{"TRUNCATED": str(truncated), "CHECKED_IN": str(checked_in)}.get(a, a) for a in argv]
    assert run(*FAST, "--out", str(tmp_path / "o"), *argv) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert list((tmp_path / "o").glob("*")) == []  # of a folder that is not there, too


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    argv = (*FAST, "--out", tmp_path / "o", "--model", "nobody/no-such-model")
    assert exit_code(FOLDER / "generate.py", *argv) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot be loaded" in last and not (tmp_path / "o").exists()
