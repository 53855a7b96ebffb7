"""Every line of the pages with `run.sh`, `reproduce.sh` or bench/strip.py, run small: on the embedded pipelines with
fewer steps, prompts and tries.
"""

import json
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from page_texts import COMMANDS
from PIL import Image
from tiny_pipelines import FOLDERS, imports_from, tiny_module

from ertacache.cli import command, settings
from ertacache.cli.settings import read_constants, read_prompts

ROOT = Path(__file__).parents[1]
STEPS = 6
FLAGS_OF_REAL_MODELS = ("--model", "--offload", "--resolution", "--aspect-ratio", "--num-frames")  # with a value each
NAMES = {folder: name for name, folder in FOLDERS.items()}


def without(flags: list[str], *names: str) -> list[str]:
    """The flags less those of `names` and their values."""
    kept, skip = [], False
    for flag in flags:
        if not skip and flag not in names:
            kept.append(flag)
        skip = flag in names
    return kept


def lines_of(script: str, *left_out: str) -> list[tuple[Path, list[str]]]:
    """(folder, flags) of each line with the script; lines that differ in what is left out alone are one."""
    lines = {}
    for folder, text in COMMANDS:
        words = shlex.split(text)
        if words[:2] in (["sh", script], ["python", {"run.sh": "generate.py"}.get(script)]):
            flags = without(words[2:], *left_out)
            lines[folder.resolve(), tuple(flags)] = (folder.resolve(), flags)
    return list(lines.values())


RUN_LINES = lines_of("run.sh", *FLAGS_OF_REAL_MODELS)
REPRODUCE_LINES = lines_of("reproduce.sh", "--model", "--num-prompts", "--seeds", "--methods", "--computed-steps")
STRIP_LINES = [shlex.split(text)[1:] for _, text in COMMANDS if "bench/strip.py ERTACache4" in text]


def names(lines: list[tuple[Path, list[str]]]) -> list[str]:
    return [f"{folder.name}: {' '.join(flags)}" for folder, flags in lines]


def fewest(folder: Path) -> list[str]:
    """Flags of a run with as little to do as there can be."""
    made = ["--num-inference-steps", str(STEPS), "--num-calibration-prompts", "2", "--effort", "balanced"]
    made += ["--height", "32", "--width", "32"]
    if isinstance(read_constants(folder / "config.py").get("num_frames", [None])[0], int):
        made += ["--num-frames", "17" if "OpenSora" in folder.name else "9"]  # the fewest of each model
    return made


def smaller(folder: Path, flags: list[str], tmp_path: Path) -> list[str]:
    """The same run.sh command with less to do; argparse takes the last of two flags."""
    prompt = read_prompts(folder / "prompts" / "calibration.txt")[0]
    made = ["--model", "tiny", *flags]
    if "--prompt" not in flags:
        made += ["--prompt", prompt]
    if "--computed-steps" in flags:
        made += ["--computed-steps", "3"]
    return [*made, *fewest(folder), "--calibration-folder", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize(("folder", "flags"), RUN_LINES, ids=names(RUN_LINES))
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
    assert record["num_inference_steps"] == STEPS
    reused = STEPS - len(record["computed_steps"])
    assert reused > 0 or record["method"] == "paper"  # whose threshold may reuse none of so few steps
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in record["files"])
    assert ("compare" in record) == ("--compare" in flags)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "flags"), REPRODUCE_LINES, ids=names(REPRODUCE_LINES))
def test_a_comparison_runs(folder, flags, tmp_path, monkeypatch):
    """The folder's own reproduce.py, with one cost, one prompt, and one rival at most."""
    monkeypatch.chdir(tmp_path)
    prompts = read_prompts(folder / "prompts" / "held_out.txt")
    (tmp_path / "vbench_prompts.txt").write_text("\n".join(prompts[:2]))
    small = [*fewest(folder), "--model", "tiny", "--num-prompts", "1", "--seeds", "0", "--computed-steps", "2"]
    asked = ["none", "ertacache"] if "vbench" in flags else ["none", "ertacache", "fewer-steps"]
    small += [
        "--num-inference-steps",
        "4",
        "--methods",
        ",".join(asked),
        "--calibration-folder",
        str(tmp_path / "mine"),
    ]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags, *small])
    with imports_from(folder), pytest.raises(SystemExit) as end:
        runpy.run_path(str(folder / "reproduce.py"), run_name="__main__")
    assert not end.value.code
    out = tmp_path / (flags[flags.index("--out") + 1] if "--out" in flags else "reproduced")
    assert {row["method"] for row in json.loads((out / "results.json").read_text())} == set(asked)
    assert (out / "table.md").stat().st_size and (out / "report.html").stat().st_size
    if "vbench" in flags:
        written = {file.relative_to(out / "vbench").as_posix() for file in (out / "vbench").rglob("*.mp4")}
        assert {f"none-uncached/{prompts[0]}-0.mp4", f"ertacache-k-2/{prompts[0]}-0.mp4"} <= written


@pytest.mark.slow
@pytest.mark.parametrize("words", STRIP_LINES, ids=" ".join)
def test_a_strip_is_drawn(words, tmp_path, monkeypatch):
    """What the page's line draws, of fewer steps, the rival's too, and not into the folder."""
    folder, results = words[1:]
    strip = runpy.run_path(str(ROOT / words[0]))
    small = [*fewest(ROOT / folder), "--calibration-folder", str(tmp_path), "--computed-steps", "2"]
    small += ["--num-inference-steps", "4"]
    parse, main = settings.parse, strip["main"]
    best = strip["best_rival"]

    def smaller_rival(*args):
        row = best(*args)
        knob = {name: min(value, 2) if name == "num_steps" else value for name, value in (row.knob or {}).items()}
        return replace(row, knob=knob)

    monkeypatch.setitem(main.__globals__, "best_rival", smaller_rival)
    monkeypatch.setattr(settings, "parse", lambda folder, argv, *rest: parse(folder, [*argv, *small], *rest))
    drawn = tmp_path / "strip.webp"
    monkeypatch.setitem(main.__globals__, "write_atomically", lambda path, data: drawn.write_bytes(data) and path)
    monkeypatch.setattr(sys, "argv", [words[0], str(ROOT / folder), results])
    with imports_from(ROOT / folder):
        main()
    with Image.open(drawn) as picture:
        assert picture.height > 100


def test_the_lines_are_found():
    for lines in (RUN_LINES, REPRODUCE_LINES):
        assert {folder for folder, _ in lines} == set(NAMES)
    assert {words[1] for words in STRIP_LINES} == {folder.name for folder in NAMES}
    assert without(["--model", "a", "--seed", "7"], "--model") == ["--seed", "7"]
