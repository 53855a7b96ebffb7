"""The layers of the library: who may import whom, what an import loads, and how large it is."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ertacache.auto
import ertacache.fit

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
COMMON = ROOT / "common"
PACKAGE = COMMON / "ertacache"
MODULES = {
    ".".join(path.relative_to(COMMON).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

ALONE = {"errors", "files", "solver", "metrics"}  # import nothing of ours but errors
# an import points left only
RUN_TIME = "errors _version files solver metrics channels cache intercept attach published schema calibration hub"
ORDER = [
    *RUN_TIME.split(),
    "provenance",
    "checks",
    "replay",
    "branches",
    "bare",
    "official",
    "api",
    "fit",
    "auto",
    "cli",
]
# of packages whose docstring lists their modules, the highest first
INNER = {
    package.__name__.split(".")[-1]: re.split(r",\s+", package.__doc__.split("\n\n")[1].strip())[::-1]
    for package in (ertacache.fit, ertacache.auto)
}
LAZY = {("calibration", "hub"), *(("", name) for name in ("fit.recipe", "fit.explain", "auto.handle"))}  # point right
MOST_LINES, MOST_FILES, MOST_MODULES = 9050, 20, 25
HEAVY = ("matplotlib", "skimage", "accelerate")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, with submodules as such; not those for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for block in for_types for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def edges() -> set[tuple[str, str]]:
    """(importer, imported) of our modules, without the package's name."""
    return {
        (name.removeprefix("ertacache").removeprefix("."), found.removeprefix("ertacache").removeprefix("."))
        for name, path in MODULES.items()
        for found in imports(path)
        if found.split(".")[0] == "ertacache"
    }


def place(name: str) -> tuple[int, int]:
    part, _, inner = name.partition(".")
    return ORDER.index(part), INNER[part].index(inner) if part in INNER and inner else 0


def test_imports_point_down():
    """So there are no circles either."""
    upwards = {(one, other) for one, other in edges() - LAZY if one and place(one) <= place(other)}
    assert not {pair for pair in upwards if not (pair[0].startswith("cli.") and pair[1].startswith("cli."))}


def test_commands_import_one_another_without_circles():
    left = {(one, other) for one, other in edges() if one.startswith("cli.") and other.startswith("cli.")}
    while left:
        done = {pair for pair in left if pair[1] not in {one for one, _ in left}}
        assert done, f"a circle in {left}"
        left -= done


def test_the_lowest_modules_import_errors_alone():
    assert {other for one, other in edges() if one in ALONE} <= {"errors"}


def test_nobody_inside_imports_the_package_itself():
    assert not {one for one, other in edges() if other == ""}


BENCHES = {path.stem for path in (ROOT / "bench").glob("*.py")}
FOLDERS = [path for path in ROOT.glob("ERTACache4*/*.py") if path.name != "reproduce.py"]


@pytest.mark.parametrize(
    ("files", "outer"),
    [
        (MODULES.values(), {"compare", "tiny_training", *BENCHES}),
        (COMMON.glob("compare/**/*.py"), {"tiny_training", *BENCHES}),
        (FOLDERS, {"compare", *BENCHES}),
    ],
    ids=["ertacache", "compare", "folders"],
)
def test_no_package_knows_an_outer_one(files, outer):
    found = [(path, name) for path in files for name in ["", *imports(path)]]
    assert len(found) > 20 and not [pair for pair in found if pair[1].split(".")[0] in outer]


def test_the_package_is_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values())
    assert lines <= MOST_LINES and len(list(PACKAGE.glob("*.py"))) <= MOST_FILES


LOADED = """
import json, sys
print("loaded", json.dumps([name for name in sys.modules]))
"""
GENERATED = """
import runpy, sys
sys.argv = ["generate.py", *sys.argv[2:]]
sys.path.insert(0, ".")
try:
    runpy.run_path("generate.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
"""


def loaded(code: str, *argv: str, folder: Path = ROOT) -> list[str]:
    """Modules after a program has run in a process of its own."""
    command = [sys.executable, "-c", code + LOADED, "-", *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.split("loaded ")[-1])


def ours(modules: list[str]) -> list[str]:
    return [name for name in modules if name.split(".")[0] in ("ertacache", "compare")]


def test_an_import_loads_little():
    modules = loaded("import ertacache")
    assert len(ours(modules)) <= MOST_MODULES and not {*HEAVY, "diffusers"} & set(modules)


def test_generating_from_a_finished_file_loads_little_and_no_rival(tmp_path):
    folder = ROOT / "ERTACache4FLUX"
    file = next((folder / "calibration").glob("tiny-*-k14.json"))
    argv = ["--model", "tiny", "--prompt", "a red circle", "--out", str(tmp_path), "--calibration", str(file)]
    modules = loaded(GENERATED, *argv, folder=folder)
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert len(ours(modules)) <= MOST_MODULES, ours(modules)
    assert not [name for name in modules if name.split(".")[0] == "compare" or name.startswith("ertacache.fit")]
    assert not {"matplotlib", "skimage"} & set(modules)
