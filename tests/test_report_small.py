"""Shortened reports: what they keep, what they say about the rest, and that they work in a browser."""

import base64
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_chromium
from made_up import curves, examples, rows
from PIL import Image

from compare import small_report
from compare.report import write_report
from compare.small_report import shrink

ROOT = Path(__file__).parents[1]


LARGE = 99 << 20  # bytes: no limit


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full report of videos of five frames."""
    path = tmp_path_factory.mktemp("report") / "full.html"
    write_report(path, rows(), examples(5), curves(), {"title": "Made up"})
    return path


@pytest.fixture
def full(report: Path) -> str:
    return report.read_text(encoding="utf-8")


def data(text: str) -> dict[str, Any]:
    return json.loads(re.findall(r'id="examples">(.*?)</script>', text, re.DOTALL)[0])


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_the_best_methods_and_evenly_picked_frames_stay_as_they_were(full: str) -> None:
    small = shrink(full, frames=3, rivals=2, max_bytes=LARGE)
    for before, after in zip(data(full)["pairs"], data(small)["pairs"], strict=True):
        assert (before["frames"], after["frames"]) == (5, 3) and after["prompt"] == before["prompt"]
        width = after["width"]
        picked = [pixels(before["uri"])[:, width * index : width * (index + 1)] for index in (0, 2, 4)]
        assert np.array_equal(pixels(after["uri"]), np.concatenate(picked, axis=1))
    for asked in {shot["asked"] for shot in data(full)["pairs"][0]["shots"]}:
        means: dict[str, list[float]] = {}
        for shot in (shot for pair in data(full)["pairs"] for shot in pair["shots"]):
            if shot["asked"] == asked and not shot["ours"]:
                means.setdefault(shot["method"], []).append(shot["psnr"])
        best = sorted(means, key=lambda method: -float(np.mean(means[method])))[:2]
        for pair in data(small)["pairs"]:
            assert {s["method"] for s in pair["shots"] if s["asked"] == asked} == {"ertacache", *best}


def test_it_says_what_it_lacks_and_keeps_charts_and_tables(full: str) -> None:
    first, _ = data(full)["pairs"]
    small = shrink(full, frames=2, rivals=1, max_bytes=1)
    assert "1 of 2 prompts" in data(small)["note"] and "2 of 5 frames" in data(small)["note"]
    assert re.findall("<svg.*?</svg>|<table.*?</table>", small) == re.findall("<svg.*?</svg>|<table.*?</table>", full)
    assert data(shrink(full, frames=5, rivals=99, max_bytes=LARGE))["note"].startswith("Shortened to 2 of 2 prompts. ")
    assert [pair["prompt"] for pair in data(small)["pairs"]] == [first["prompt"]]


def test_the_command_writes_the_small_file(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.html"
    assert small_report.main([str(report), "--out", str(out), "--rivals", "1"]) == 0
    assert out.stat().st_size < report.stat().st_size / 2 and "small.html: " in capsys.readouterr().out
    (tmp_path / "other.html").write_text("<p>no report</p>")
    assert small_report.main([str(tmp_path / "other.html"), "--out", str(tmp_path / "x.html")]) == 1
    assert "holds no examples" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_a_shortened_report_works_in_a_browser(full: str, tmp_path: Path) -> None:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("neither chromium nor chromium-browser is on PATH")
    (tmp_path / "small.html").write_text(shrink(full, frames=2, rivals=2))
    with Browser(chromium) as browser:
        browser.open(tmp_path / "small.html")
        assert "2 of 5 frames" in browser.evaluate("document.querySelector('#see').textContent")
        assert browser.evaluate("document.querySelectorAll('.strip').length") == 3
        assert browser.evaluate("methods.children.length") == 3
        assert browser.problems == []


def tracked_files() -> list[Path]:
    """Files of the repository as git lists them; skips the test outside of a clone."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a clone")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_repository_is_light() -> None:
    assert sum(path.stat().st_size for path in tracked_files()) <= 40 << 20
    for report in ROOT.glob("ERTACache4*/report.html"):
        assert report.stat().st_size < 1_500_000, report
