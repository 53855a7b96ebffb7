"""Commands on the pages exist, and know the flags that they are given."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from page_texts import COMMANDS, FIRST_FOLDER, FOLDERS, ROOT

from compare import reproduce
from ertacache.cli import inspect, settings
from ertacache.cli.run import COMPARE_FLAG
from ertacache.errors import UsageError

# What no test can run: it needs the network, an account, or a tool of somebody else. What `run.sh`, `reproduce.sh` and
# bench/strip.py do is run by tests/test_page_commands.py; of others it is checked that they exist and know the flags.
NOT_RUN = ("git clone ", "pip install -e ", "hf download ", "hf auth login", "vbench evaluate ", "pre-commit install")


@pytest.mark.parametrize(("folder", "command"), COMMANDS, ids=[f"{f.name}: {c[:60]}" for f, c in COMMANDS])
def test_commands_exist_with_their_flags(folder, command, capsys):
    check_command(folder, command, capsys)


def check_command(folder: Path, command: str, capsys) -> None:
    words = shlex.split(command)
    program = re.sub(r"^(\.\./)?\.venv/bin/", "", words[0])
    if program != words[0]:
        root = folder / words[0].removesuffix(f".venv/bin/{program}")
        assert ROOT in (root.resolve(), folder.parent), f"{command} is given in {folder}"
    if words[0] == "sh":
        check_script(folder, words[1], words[2:])
    elif words[0] == "make":
        assert set(words[1:]) <= set(makefile())
    elif program == "ertacache":
        check_ertacache(words[1:], capsys)
    elif program == "python":
        check_python(words[1:], folder)
    else:
        assert " ".join([program, *words[1:]]).startswith(NOT_RUN), (
            f"{command}: not known to tests/test_docs_commands.py"
        )


@pytest.mark.parametrize(
    "command",
    [
        "sh run.sh --speed 2",
        "sh run.sh --speedup fast",
        "sh run.sh --threshold 0.5",
        "sh reproduce.sh --layout square",
        "sh reproduce.sh --speedup 2",
        "python bench/latency.py --fast",
        "python bench/none.py",
        "python generate.py --speed 2",
        "python -m ertacache.none",
        ".venv/bin/hf",
        "../../.venv/bin/hf auth login",
        "make everything",
        "rm -r sample",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command, capsys):
    with pytest.raises((AssertionError, UsageError)):
        check_command(FIRST_FOLDER, command, capsys)


def check_script(folder: Path, name: str, argv: list[str]) -> None:
    assert (folder / name).is_file(), f"{name} is not in {folder.name}"
    if Path(name).name == "test.sh":
        assert "sh test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        if argv[:1] == ["-m"]:
            assert f'"{argv[1]}: ' in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), f"no marker {argv[1]}"
            argv = argv[2:]
        assert all((ROOT / word).exists() for word in argv)
        return
    if Path(name).parent.name == "bench":
        script = Path(name).with_suffix(".py")
        if (ROOT / script).exists():
            check_python([str(script), *argv], folder)
        return
    # UsageError for an unknown flag or a value of the wrong type
    if name == "reproduce.sh":
        reproduce.parse(folder, argv)
        return
    chosen = settings.parse(folder, argv, "", [COMPARE_FLAG])
    if not isinstance(chosen.threshold, str):
        settings.check(chosen)


def check_ertacache(argv: list[str], capsys) -> None:
    """Run it, on a checked-in calibration and the pipeline that it is for."""
    calibration = str(next(iter(sorted((FIRST_FOLDER / "calibration").glob("tiny-*.json")))))
    stands_for = {"FILE": calibration, "mine/FILE.json": calibration, "FOLDER": str(FIRST_FOLDER / "tiny")}
    assert inspect.main([stands_for.get(word, word) for word in argv]) == 0
    assert capsys.readouterr().out


def check_python(words: list[str], folder: Path) -> None:
    """The script or module exists and knows the flags; nothing of it is run."""
    if words[0] in ("generate.py", "reproduce.py"):
        check_script(folder, words[0].replace("generate.py", "run.sh").replace(".py", ".sh"), words[1:])
        return
    if words[0] == "-m":
        path = ROOT / "common" / Path(*words[1].split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        words = words[1:]
    else:
        path = next((p for p in (ROOT / words[0], folder / words[0]) if p.exists()), ROOT / words[0])
    assert path.exists(), path
    text = path.read_text(encoding="utf-8")
    if path.name == "train_tiny.py":
        text += (ROOT / "common" / "tiny_training" / "plan.py").read_text(encoding="utf-8")
    known = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", text))
    for word in words[1:]:
        if word.startswith("--"):
            assert word in known, f"{path.name} knows no {word}"


def makefile() -> dict[str, str]:
    """Targets of the Makefile and what they run."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    return dict(re.findall(r"^(\w+):.*\n((?:\t.*\n?)*)", text, re.MULTILINE))


@pytest.mark.parametrize("target", sorted(makefile()))
def test_the_makefile_runs_what_exists(target):
    for line in makefile()[target].splitlines():
        for command in re.findall(r"\$\(PYTHON\) ([^&|;]+)", line):
            words = shlex.split(command.replace("$$", ""))
            if words[:2] not in (["-m", "ruff"], ["-m", "mypy"]):
                check_python(words, ROOT)
    assert target in (ROOT / "Makefile").read_text(encoding="utf-8").split(".PHONY:")[1].splitlines()[0]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
@pytest.mark.parametrize(("script", "python"), [("run.sh", "generate.py"), ("reproduce.sh", "reproduce.py")])
def test_scripts_pass_their_flags_on(folder, script, python, tmp_path):
    """With a set-up in place of the real one, whose Python prints what it was called with."""
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / script).write_bytes((folder / script).read_bytes())
    (tmp_path / "setup.sh").write_text('PYTHON="$root/echo.sh"\n')
    (tmp_path / "echo.sh").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\nexit 3\n')
    (tmp_path / "echo.sh").chmod(0o755)
    done = subprocess.run(
        ["sh", tmp_path / folder.name / script, "--prompt", "two words"], capture_output=True, text=True, check=False
    )
    first, *rest = done.stdout.splitlines()
    assert Path(first).name == python and rest == ["--prompt", "two words"] and done.returncode == 3
