"""The pages keep their word: links and files exist, examples run, and versions agree."""

import ast
import builtins
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from page_texts import FIRST_FOLDER, FOLDERS, PAGES, ROOT, prose
from toys import ToyPipeline, curved

import ertacache
from compare.plots import main as plots_main
from ertacache.calibration import Calibration

REGISTRIES = ("pypi.org", "pythonhosted.org", "anaconda.org", "npmjs.com")


# -- links and files -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that the hub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_names_the_host_of_a_package_registry(page):
    text = page.read_text(encoding="utf-8")
    assert not [host for host in REGISTRIES if host in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = prose(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_links_every_page_and_folder():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("docs/*.md")), *(folder / "README.md" for folder in FOLDERS)]:
        assert f"]({path.relative_to(ROOT)})" in page, path


def test_figures_are_drawn_from_the_results():
    """`make figures` draws them again."""
    results = ROOT / "bench" / "results" / "flux_tiny.json"
    assert plots_main([str(results), "--out", str(FIRST_FOLDER / "figures"), "--check"]) == 0


def test_functions_named_on_the_methods_page_exist():
    """`module.name` and `fit.module.name`, in running text and beside equations."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./])((?:fit\.)?[a-z_]+)\.([A-Za-z_]\w+)(?![\w/])", page)
    package = ROOT / "common" / "ertacache"
    named = [pair for pair in named if pair[0].startswith("fit.") or (package / f"{pair[0]}.py").exists()]
    assert len(named) > 10
    for module, name in named:
        assert hasattr(importlib.import_module(f"ertacache.{module}"), name), f"{module}.{name}"


# -- examples --------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_pages_compiles(page):
    for code in python_blocks(page):
        compile(code, str(page), "exec")


LOOP = {"N", "schedule", "sigma", "coefficients", "b", "model", "x"}  # of the method at run time
# what a page says in words that the reader has
GIVEN = {
    "README.md": {"pipe", "prompts", "prompt", *LOOP},
    "method.md": LOOP,
    "calibration-file.md": {"pipe", "prompts"},
    "enable.md": {"pipe", "prompts", "prompt"},
    "pipelines.md": {"pipe", "prompts", "arguments"},
    "ERTACache4OpenSora1.2/README.md": {"model", "scheduler", "arguments"},
    "official-packages.md": {
        *("ertacache", "model", "scheduler", "text_encoder", "z", "prompts", "prompt", "batch_prompts_loop", "device"),
        *("model_args", "verbose", "masks", "denoise", "inp", "timesteps", "opts", "CachedPipeline", "path", "self"),
        *("torch", "vae", "latent_size", "seed", "dtype", "num_frames", "latents", "sample", "decode"),
    },
}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "extending.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_pages_imports_what_it_uses(page):
    """docs/extending.md is run as a whole by tests/test_extending.py."""
    given = GIVEN.get(page.name if page.parent not in FOLDERS else f"{page.parent.name}/{page.name}", set())
    for code in python_blocks(page):
        names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        assert not {node.id for node in names} - bound - given


class Result(tuple):
    """What a pipeline returns: a tuple whose first item is also `images`."""

    @property
    def images(self) -> torch.Tensor:
        return self[0]


class Pipeline(ToyPipeline):
    def __call__(self, prompt, **kwargs) -> Result:
        return Result(super().__call__(prompt, **kwargs))


@pytest.mark.parametrize(("page", "place"), [("README.md", -1), ("docs/calibration-file.md", 0)])
def test_the_library_example_runs(page, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"pipe": Pipeline(curved), "prompts": ["a", "b"], "prompt": "c", "ertacache": ertacache}
    exec(compile(python_blocks(ROOT / page)[place], page, "exec"), names)
    (file,) = tmp_path.glob("*.json")
    assert Calibration.load(file) == names["calibration"]


def test_the_examples_of_enable_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path / "store"))
    names = {"pipe": Pipeline(curved), "prompts": ["a", "b"], "prompt": "c"}
    for code in [python_blocks(ROOT / "README.md")[0], *python_blocks(ROOT / "docs" / "enable.md")]:
        exec(compile(code, "enable.md", "exec"), names)
    assert len(names["bundle"]) == 9 and (tmp_path / "flux.json").exists()


# -- the package -----------------------------------------------------------------------------------------


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert project == ertacache.__version__
    assert f"\nversion: {project}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## .*?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == project


def test_the_citation_and_the_hooks_are_whole():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert all({"type", "title", "authors"} <= set(reference) for reference in citation["references"])
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    assert all(hook["entry"].startswith(".venv/bin/ruff ") for hook in repository["hooks"])


def test_everything_public_says_what_it_is():
    assert ertacache.__doc__ and ertacache.__all__ == sorted(ertacache.__all__, key=lambda n: (n.islower(), n))
    for name in ertacache.__all__:
        assert getattr(ertacache, name).__doc__, name
    for path in sorted((ROOT / "common" / "ertacache").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
