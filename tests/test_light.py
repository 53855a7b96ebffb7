"""What is tracked stays light enough to travel."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORTS = sorted(ROOT.glob("ERTACache4*/report.html"))


def test_tracked_files_take_at_most_40_mib():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 40 * 2**20


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.parent.name)
def test_a_report_takes_at_most_a_megabyte_and_a_half(report):
    assert report.stat().st_size <= 1.5e6
