"""Writes the list of files in the README, a line each, from the files' own first lines: `python bench/readme_tree.py`.

--check changes nothing and exits with 1 when the README says something else.
"""

import argparse
import ast
import fnmatch
import sys
from pathlib import Path

from record import ROOT

from compare.pages import replace_between

MARKER = "tree"
FIRST_FOLDER = "ERTACache4FLUX"  # the others are listed by what they have beside it
# what cannot say it itself, or says it at length
SAID = {
    ".ci/run": "what continuous integration runs",
    ".pre-commit-config.yaml": "lint and format before a commit",
    "CHANGELOG.md": "what changed, for users",
    "CITATION.cff": "how to cite",
    "CONTRIBUTING.md": "set up, test, add a number to a table, commit",
    "LICENSE": "Apache-2.0",
    "Makefile": "lint, types, test, bench, figures, tree",
    "README.md": "this page",
    "pyproject.toml": "the package, and the settings of its tools",
    "requirements-dev.lock": "versions that the tests install as well",
    "requirements.lock": "versions that every set-up installs",
    "ERTACache4FLUX/README.md": "commands, table and pictures of this model",
    "ERTACache4FLUX/calibration/": "calibrations: checked-in ones of the tiny pipeline, and those that run.sh makes",
    "ERTACache4FLUX/figures/": "quality against speed-up, and the schedules",
    "ERTACache4FLUX/prompts/": "to generate (examples), to calibrate on, and to measure on (held out)",
    "ERTACache4FLUX/report.html": "pictures, charts and tables of the last comparison: open it in a browser",
    "ERTACache4FLUX/strip.png": "uncached, ERTACache and the best rival at a comparable cost, side by side",
    "ERTACache4FLUX/tiny/": "embedded trained pipeline, and config.py with what it overrides",
    "docs/calibration-file.md": "fields of a calibration, what is checked and said, how to look into one and share it",
    "docs/compatibility.md": "what was tried with schedulers, guidance, LoRA, offloading and so on, and what happens",
    "docs/extending.md": "how to add a model, as a script and as a folder, with an example that runs",
    "docs/log.md": "dated experiments, the negative ones too",
    "docs/method.md": "equations and the functions that implement them, the ablation, and when it fails",
    "docs/speed.md": "seconds, memory, what a reused step and a calibration cost, and how many prompts are enough",
    "docs/vbench.md": "how to score videos with VBench",
    "bench/results/": "results as JSON, from which every table and figure is made",
    "common/ertacache/data/": "LPIPS' linear layers, and the parts of report.html",
    "common/ertacache/published.json": "the paper's numbers",
    "tests/": "one file a module or folder; vectors/ holds golden values",
}
HIDDEN = (".ci", ".pre-commit-config.yaml")  # the hidden ones that people should know of


def first_line(path: Path) -> str:
    """What a file says about itself: a docstring's, script's or page's first sentence."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    elif path.suffix == ".md":
        line = next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    else:
        line = next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    return line.replace("`", "").split(". ")[0].rstrip(".:")


def said(name: str) -> str:
    return SAID.get(name) or first_line(ROOT / name)


def top_level() -> list[str]:
    """Files and folders (with a slash) at the root, but for hidden and ignored ones."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    found = [p for p in ROOT.iterdir() if not p.name.startswith(".") or p.name in HIDDEN]
    found = [p for p in found if not any(fnmatch.fnmatch(p.name, pattern) for pattern in ignored)]
    return sorted(p.name + ("/" if p.is_dir() else "") for p in found)


def tree() -> str:
    """The list as text, a line a file, folders before what is in them."""
    lines = [(name, said(name)) for name in top_level() if not name.endswith("/")]
    lines.append((".ci/run", said(".ci/run")))
    first = model_folder(ROOT / FIRST_FOLDER)
    lines += [(f"{FIRST_FOLDER}/{name}", text) for name, text in first.items()]
    for folder in sorted(ROOT.glob("ERTACache4*")):
        if folder.name != FIRST_FOLDER:
            beside = {name: text for name, text in model_folder(folder).items() if name not in first}
            lines += [(f"{folder.name}/", f"the same{', and' if beside else ''}")]
            lines += [(f"{folder.name}/{name}", text) for name, text in beside.items()]
    for folder in ("common/ertacache", "common/ertacache/rivals", "common/tiny_training", "bench"):
        lines += [(f"{folder}/{p.name}", first_line(p)) for p in sorted((ROOT / folder).glob("*.py"))]
    lines += [(name, SAID[name]) for name in SAID if name.startswith(("common/", "bench/", "tests/"))]
    lines += [(f"docs/{p.name}", said(f"docs/{p.name}")) for p in sorted((ROOT / "docs").glob("*.md"))]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def model_folder(folder: Path) -> dict[str, str]:
    """What is in a model folder, with what it says; not what users put there."""
    found = {}
    for path in sorted(folder.iterdir()):
        name = path.name + ("/" if path.is_dir() else "")
        known = SAID.get(f"{FIRST_FOLDER}/{name}")
        package = path / "__init__.py" if path.is_dir() else path
        if known or (package.exists() and package.suffix in (".py", ".sh")):
            found[name] = known or first_line(package)
    return found


def replaced(page: str) -> str:
    """The page with the list between its markers; ValueError where they are not there."""
    return replace_between(page, f"```text\n{tree()}\n```", MARKER)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the README would change")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    page = readme.read_text(encoding="utf-8")
    new = replaced(page)
    if options.check:
        return int(new != page)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
