"""Every line of the pages with a script of bench/ that measures, run small: fewer steps, prompts and repeats."""

import json
import runpy
import shlex
import sys
import tempfile
from pathlib import Path

import held_memory
import pytest
from page_texts import COMMANDS

ROOT = Path(__file__).parents[1]
CUT_DOWN = ["--layers", "0.02", "--scale", "0.1", "--steps", "3", "--computed", "2", "--repeats", "1"]
SMALL = {
    "ablation.py": ["flux", "--prompts", "2", "--held-out", "1", "--computed-steps", "3"],
    "carry_over.py": ["--methods", "ertacache", "--computed-steps", "9", "--held-out", "1"],
    "changed_weights.py": ["--prompts", "1", "--calibration-prompts", "2"],
    "enable.py": ["flux", "--steps", "4", "--held-out", "1"],
    "few_steps.py": ["flux", "--steps", "2", "--held-out", "1", "--repeats", "1"],
    "fuzz_calibration.py": ["--seconds", "1"],
    "fuzz_enable.py": ["--kills", "2", "--settings", "2"],
    "fuzz_kill.py": ["--kills", "1"],
    "latency.py": ["wan", *CUT_DOWN, "--frames", "5"],
    "latency.py --tiny": ["flux", "--computed", "9", "--repeats", "1"],
    "prompts_needed.py": ["flux", "--counts", "1", "2", "--held-out", "1", "--draws", "1", "--speedups", "3"],
    "realism.py": ["flux", "--prompts", "1"],
    "scaling.py": ["--steps", "4", "8", "--factors", "1", "2"],
}
LINES = sorted(
    {text.removeprefix(".venv/bin/") for _, text in COMMANDS if "python bench/" in text and "strip.py" not in text}
)
PAGES = ("python bench/speed_page.py",)  # writes a page, and is checked against it elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in LINES if line not in PAGES])
def test_it_measures(line, tmp_path, tmp_path_factory, monkeypatch):
    _, script, *flags = shlex.split(line)
    name = Path(script).name
    if name == "changed_weights.py":
        for package in ("peft", "torchao"):
            pytest.importorskip(package, reason=f"what changed weights cost needs {package}, which is not installed")
    small = SMALL[f"{name} --tiny" if "--tiny" in flags else name]
    # seven rivals' memory takes half a minute, and is tested elsewhere
    caches = held_memory._caches
    monkeypatch.setattr(held_memory, "_caches", lambda *given: caches(*given)[:2])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("work")))
    monkeypatch.setattr(sys, "argv", [name, *flags, *small, "--out", str(tmp_path)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code
    (made,) = tmp_path.iterdir()
    record = json.loads(made.read_text())
    assert record["device_kind"] == "cpu" and record["seconds"] >= 0
    assert ("memory" in record) == ("--memory" in flags)


def test_the_lines_are_found():
    assert {Path(line.split()[1]).name for line in LINES} == {name for name in SMALL if " " not in name} | {
        "speed_page.py"
    }
