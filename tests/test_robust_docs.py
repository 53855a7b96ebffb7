"""docs/compatibility.md names only tests that exist, and every file of tests for it."""

import ast
import json
import re
from pathlib import Path

import changed_weights

from compare.pages import fill, markers

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")


def test_every_named_test_exists():
    named = re.findall(r"`T/(\w+)\.py::(\w+)`", PAGE)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((TESTS / f"test_robust_{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}: {name}"


def test_every_row_names_a_test():
    begin, end = markers(changed_weights.MARKER)  # what is between them was measured, not tested
    written = PAGE.split(begin)[0] + PAGE.split(end)[1]
    rows = [line for line in written.splitlines() if line.startswith("| ") and not line.startswith("| Tried |")]
    assert all("`T/" in row for row in rows)


def test_every_named_file_exists():
    for name in re.findall(r"bench/[\w/]+\.(?:py|json)", PAGE):
        assert (TESTS.parent / name).exists(), name


def test_the_table_of_changed_weights_is_that_of_its_result():
    record = json.loads(changed_weights.RESULT.read_text(encoding="utf-8"))
    fill(changed_weights.PAGE, changed_weights.table(record), changed_weights.MARKER, check=True)


def test_without_the_packages_nothing_is_measured(monkeypatch, tmp_path, capsys):
    """Rows of earlier weights beside new ones would be a table of two pipelines."""
    monkeypatch.setattr(changed_weights, "NEEDED", ("no_such_package",))
    assert changed_weights.main(["--out", str(tmp_path)]) == 1
    assert "needs no_such_package" in capsys.readouterr().err and not list(tmp_path.iterdir())
