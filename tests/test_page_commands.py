"""Every `sh run.sh` line of the pages, run on the embedded pipelines with fewer steps, prompts and tries."""

import json
import shlex
from pathlib import Path

import pytest
from test_docs import COMMANDS
from tiny_pipelines import FOLDERS, tiny_module

from ertacache import command
from ertacache.settings import read_constants, read_prompts

STEPS = 6
FLAGS_OF_REAL_MODELS = ("--model", "--resolution", "--aspect-ratio", "--num-frames")  # with a value each
NAMES = {folder: name for name, folder in FOLDERS.items()}


def run_lines() -> list[tuple[Path, list[str]]]:
    """(folder, flags) of each line; lines that differ in the model alone are one."""
    lines = {}
    for folder, text in COMMANDS:
        words = shlex.split(text)
        if words[:2] == ["sh", "run.sh"] and words[-1] != "fast":  # a page shows what a bad value brings
            flags = without(words[2:], *FLAGS_OF_REAL_MODELS)
            lines[folder.resolve(), tuple(flags)] = (folder.resolve(), flags)
    return list(lines.values())


def without(flags: list[str], *names: str) -> list[str]:
    """The flags less those of `names` and their values."""
    kept, skip = [], False
    for flag in flags:
        if not skip and flag not in names:
            kept.append(flag)
        skip = flag in names
    return kept


def smaller(folder: Path, flags: list[str], tmp_path: Path) -> list[str]:
    """The same command with less to do; argparse takes the last of two flags."""
    prompt = read_prompts(folder / "prompts" / "calibration.txt")[0]
    made = ["--model", "tiny", *flags]
    if "--prompt" not in flags:
        made += ["--prompt", prompt]
    if "--computed-steps" in flags:
        made += ["--computed-steps", "3"]
    if isinstance(read_constants(folder / "config.py").get("num_frames", [None])[0], int):
        made += ["--num-frames", "17" if "OpenSora" in folder.name else "9"]  # the fewest of each model
    made += ["--num-inference-steps", str(STEPS), "--num-calibration-prompts", "2", "--search-budget", "0"]
    return [
        *made,
        "--refine",
        "0",
        "--descent",
        "0",
        "--calibration-folder",
        str(tmp_path / "mine"),
        "--out",
        str(tmp_path / "out"),
    ]


@pytest.mark.parametrize(("folder", "flags"), run_lines(), ids=[f"{f.name}: {' '.join(c)}" for f, c in run_lines()])
def test_it_runs(folder, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files named in flags lie where the command is given
    (tmp_path / "my_prompts.txt").write_text("\n".join(read_prompts(folder / "prompts" / "calibration.txt")[:3]))
    main = tiny_module(NAMES[folder]).main
    if "--calibration" in flags:
        assert command.run(lambda: main(smaller(folder, ["--speedup", "2"], tmp_path))) == 0
        flags = ["--calibration", str(next((tmp_path / "mine").iterdir()))]
    argv = smaller(folder, flags, tmp_path)
    assert command.run(lambda: main(argv)) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["num_inference_steps"] == STEPS and len(record["computed_steps"]) < STEPS
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in record["files"])
    assert ("compare" in record) == ("--compare" in flags)


def test_the_lines_are_found():
    assert {folder for folder, _ in run_lines()} == set(NAMES)
    assert without(["--model", "a", "--seed", "7"], "--model") == ["--seed", "7"]
