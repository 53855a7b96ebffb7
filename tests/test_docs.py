"""The pages keep their word: links and files exist, commands parse, examples run, and versions agree."""

import ast
import builtins
import importlib
import json
import math
import re
import shlex
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import readme_tree
import torch
import yaml
from toys import ToyPipeline, curved

import ertacache
from ertacache import cli, reproduce, settings
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError, UsageError
from ertacache.generation import COMPARE_FLAG
from ertacache.pages import markers
from ertacache.plots import main as plots_main
from ertacache.results import read_results
from ertacache.schema import MAX_FILE_BYTES

ROOT = Path(__file__).parents[1]
FOLDERS_OF_PAGES = ("", "docs/", "ERTACache4*/", "common/ertacache/data/")
PAGES = sorted(page for folder in FOLDERS_OF_PAGES for page in ROOT.glob(f"{folder}*.md"))
REGISTRIES = ("pypi.org", "pythonhosted.org", "anaconda.org", "npmjs.com")
FOLDERS = sorted(ROOT.glob("ERTACache4*"))
FIRST_FOLDER = ROOT / "ERTACache4FLUX"  # which the front page's commands are given in

CHECKOUT = "ertacache"  # where `git clone` put it, whatever the folder is called here
# What no test can run: it needs the network, an account, or a tool of somebody else. What `run.sh`, `reproduce.sh` and
# bench/strip.py do is run by tests/test_page_commands.py; of others it is checked that they exist and know the flags.
NOT_RUN = ("git clone ", "hf download ", "hf auth login", "vbench evaluate ", "pre-commit install")


# -- links and files -------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


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


def test_the_front_page_lists_every_file():
    """`make tree` renews the list."""
    assert readme_tree.main(["--check"]) == 0


def test_the_front_page_names_what_is_there():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in readme_tree.top_level():
        assert name in page, f"{name} is not in the README: `make tree`"
    begin, end = markers(readme_tree.MARKER)
    listed = page.split(begin)[1].split(end)[0]
    for line in listed.strip().splitlines()[1:-1]:
        assert (ROOT / line.split("  ")[0]).exists(), line


def test_the_front_page_links_every_page_and_folder():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("docs/*.md")), *(folder / "README.md" for folder in FOLDERS)]:
        assert f"]({path.relative_to(ROOT)})" in page, path


def test_figures_are_drawn_from_the_results():
    """`make figures` draws them again."""
    results = ROOT / "bench" / "results" / "flux_tiny.json"
    assert plots_main([str(results), "--out", str(FIRST_FOLDER / "figures"), "--check"]) == 0


def test_functions_named_on_the_methods_page_exist():
    """`module.name` of the library, in running text and beside equations."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./])([a-z_]+)\.([A-Za-z_]\w+)", page)
    named = [(module, name) for module, name in named if (ROOT / "common" / "ertacache" / f"{module}.py").exists()]
    assert len(named) > 10
    for module, name in named:
        assert hasattr(importlib.import_module(f"ertacache.{module}"), name), f"{module}.{name}"


# -- numbers of the tiny pipelines -------------------------------------------------------------------------


def training(folder: Path) -> dict:
    return json.loads((folder / "tiny" / "training.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_how_well_a_tiny_pipeline_follows_its_prompts_is_what_was_measured(folder):
    report = training(folder)
    page = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    made, rendered = report["adherence"], report["adherence_of_rendered_scenes"]
    said = f"Of the objects that {report['prompts']} prompts name which it was not trained on, a judge finds "
    if isinstance(made, float):
        said += f"{made:.0%} right in shape and colour; of rendered scenes it finds {rendered:.0%}"
    else:
        parts = ("first_frame", "motion", "all")
        first, motion, everything = (f"{made[part]:.0%}" for part in parts)
        said += f"{first} right in shape and colour in the first frame, {motion} in direction where one is named, and "
        said += f"{everything} in all of that; of rendered scenes it finds "
        said += "{:.0f}, {:.0f} and {:.0f} %".format(*(100 * rendered[part] for part in parts))
    assert said.replace("%", " %").replace("  ", " ") in page


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_settings_on_a_folders_page_are_those_of_its_config(folder):
    constants = settings.read_constants(folder / "config.py")
    said = re.findall(r"`([A-Z_]+) = ([^`]+)`", (folder / "README.md").read_text(encoding="utf-8"))
    assert {"NUM_INFERENCE_STEPS", "GUIDANCE_SCALE", "DTYPE"} <= {name for name, _ in said}
    for name, value in said:
        assert ast.literal_eval(value) == constants[name.lower()][0], f"{name} = {value}"


def test_the_front_page_says_how_badly_the_video_pipelines_follow_their_prompts():
    rates = [report["adherence"]["all"] for report in map(training, FOLDERS) if isinstance(report["adherence"], dict)]
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"a judge finds {100 * min(rates):.0f} to {100 * max(rates):.0f} % of the objects named right" in page


def words_of(page: Path) -> str:
    """A page's text with every run of white space as one space."""
    return " ".join(page.read_text(encoding="utf-8").split())


def psnrs_of_flux(method: str) -> dict[int, float]:
    """Computed steps -> PSNR of the FLUX comparison's rows of a method."""
    rows, _ = read_results(ROOT / "bench" / "results" / "flux_tiny.json")
    return {row.asked_steps: row.psnr for row in rows if row.method == method}


def kept_calibrations() -> list[Path]:
    return sorted(ROOT.glob("ERTACache4*/calibration/tiny-*.json"))


def test_the_front_page_says_what_the_efforts_brought():
    page, best, plain = words_of(ROOT / "README.md"), psnrs_of_flux("ertacache"), psnrs_of_flux("+ our schedule")
    assert f"reaches {best[11]:.1f} dB at 11 of 28 steps" in page
    assert "without descent it was 46.4" in page and "(46.42 before)" in (ROOT / "docs/log.md").read_text()
    assert f"{plain[14]:.1f}, {plain[11]:.1f} and {plain[9]:.1f} dB for FLUX" in page


def test_the_front_page_says_what_effort_the_kept_calibrations_took():
    page = words_of(ROOT / "README.md")
    efforts = [Calibration.load(path) for path in kept_calibrations()]
    tries, refined = (max(each.settings.get(name) or 0 for each in efforts) for name in ("search_budget", "refine"))
    assert f"took up to {tries} tries of schedules" in page and f"refinement on up to {refined} prompts" in page
    descended = [each for each in efforts if each.settings.get("descent")]
    counts = sorted((len(each.computed_steps) for each in descended), reverse=True)
    assert f"FLUX at {' and '.join(map(str, counts))} steps, gradient descent" in page
    for each in descended:
        assert f"gradient descent on {each.prompts['count']} prompts" in page
        assert f"with {each.settings['descent']} steps and {each.prompts['count']} prompts" in page


@pytest.mark.parametrize("page", ["README.md", "docs/calibration-file.md"])
def test_pages_say_how_large_calibrations_are(page):
    sizes = {path: path.stat().st_size / 1000 for path in kept_calibrations()}
    large = [size for path, size in sizes.items() if Calibration.load(path).channel_coefficients]
    small = [size for size in sizes.values() if size not in large]
    assert min(small) >= 5 and max(small) <= 8 and "five to eight kilobytes" in words_of(ROOT / page)
    assert f"{round(min(large), -1):.0f} to {round(max(large), -1):.0f} where channels" in words_of(ROOT / page)


PUBLISHED = json.loads((ROOT / "common/ertacache/published.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_the_front_page_says_the_published_time_and_the_size_of_the_folders_page(folder):
    (line,) = re.findall(rf"^\| \[[^\]]+\]\({folder.name}/README.md\) \|.* GB .*$", front_page(), re.MULTILINE)
    _, _, weights, size, seconds, _, _ = (cell.strip() for cell in line.split("|"))
    (row,) = [row for row in PUBLISHED["rows"] if row["method"] == "ERTACache" and belongs(row, folder)]
    assert seconds == f"{row['seconds']:.2f} s"
    assert f"needs about {size.split(' GB')[0]} GB of GPU memory" in words_of(folder / "README.md")
    assert settings.read_constants(folder / "config.py")["real_model"][0] in weights


def front_page() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def belongs(row: dict, folder: Path) -> bool:
    return any(name in folder.name.lower() for name in row["match"])


def test_the_flux_page_counts_the_parameters_of_its_tiny_pipeline():
    counts = {part: parameters(FIRST_FOLDER / "tiny" / part) / 1e6 for part in ("transformer", "vae")}
    encoders = sum(parameters(FIRST_FOLDER / "tiny" / part) / 1e6 for part in ("text_encoder", "text_encoder_2"))
    said = f"{sum(counts.values()) + encoders:.1f} million parameters (transformer {counts['transformer']:.2f}, "
    assert said + f"VAE {counts['vae']:.2f}, text encoders {encoders:.2f})" in words_of(FIRST_FOLDER / "README.md")


def parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


# -- commands --------------------------------------------------------------------------------------------


def commands(page: Path) -> list[tuple[Path, str]]:
    """Commands of a page's sh blocks and of its running text, without comments, each with the folder it is given in.

    The front page's blocks follow one another, from outside of the checkout, but for lines in parentheses, which are
    given at the root; others start in the page's folder, or at the root.
    """
    front = page == ROOT / "README.md"
    start = page.parent if page.parent in FOLDERS else FIRST_FOLDER
    folder = ROOT.parent
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if not front:
            folder = page.parent if page.parent in FOLDERS else ROOT
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s+)# .*", "", line)
            alone = re.fullmatch(r"\((.*)\)", line)
            if alone:
                found += in_turn(alone[1], ROOT, page)[0]
            else:
                given, folder = in_turn(line, folder, page)
                found += given
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    named = re.compile(r"(sh (run|reproduce)\.sh|make \w|\S*\.venv/bin/|python (-m|[\w/]+\.py))")
    return found + [(start, span) for span in spans if named.match(span) and not re.search(r"/bin/\w+$", span)]


def in_turn(line: str, folder: Path, page: Path) -> tuple[list[tuple[Path, str]], Path]:
    """The commands of a line, each with the folder it is given in, and the folder after it."""
    found = []
    for command in line.split(" && "):
        if command.startswith("cd "):
            first, _, rest = command.split()[1].partition("/")
            folder = ROOT / rest if first == CHECKOUT else folder / command.split()[1]
            assert folder.is_dir(), f"{page.name}: {command}"
        elif command.strip():
            found.append((folder, " ".join(command.split())))
    return found, folder


COMMANDS = sorted({found for page in PAGES for found in commands(page)})


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
        assert " ".join([program, *words[1:]]).startswith(NOT_RUN), f"{command}: not known to tests/test_docs.py"


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
        assert all((ROOT / word).exists() for word in argv)
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
    assert cli.main([stands_for.get(word, word) for word in argv]) == 0
    assert capsys.readouterr().out


def check_python(words: list[str], folder: Path) -> None:
    """The script or module exists and knows the flags; nothing of it is run."""
    if words[0] == "-m":
        path = ROOT / "common" / Path(*words[1].split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        words = words[1:]
    else:
        path = next((p for p in (ROOT / words[0], folder / words[0]) if p.exists()), ROOT / words[0])
    assert path.exists(), path
    known = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", path.read_text(encoding="utf-8")))
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


# -- examples --------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_pages_compiles(page):
    for code in python_blocks(page):
        compile(code, str(page), "exec")


# what a page says in words that the reader has
GIVEN = {
    "README.md": {"pipe", "prompts", "prompt"},
    "calibration-file.md": {"pipe", "prompts"},
    "ERTACache4OpenSora1.2/README.md": {"model", "scheduler", "arguments"},
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


@pytest.mark.parametrize("page", ["README.md", "docs/calibration-file.md"])
def test_the_library_example_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"pipe": Pipeline(curved), "prompts": ["a", "b"], "prompt": "c", "ertacache": ertacache}
    exec(compile(python_blocks(ROOT / page)[0], page, "exec"), names)
    (file,) = tmp_path.glob("*.json")
    assert Calibration.load(file) == names["calibration"]


# -- the calibration file --------------------------------------------------------------------------------

FILE_PAGE = (ROOT / "docs" / "calibration-file.md").read_text(encoding="utf-8")


def test_the_page_lists_every_field_of_a_calibration():
    table = FILE_PAGE.split("## Fields")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(["schema", *(field.name for field in fields(Calibration))])
    required = [field.name for field in fields(Calibration) if field.default is field.default_factory]
    assert set(listed[:10]) == {"schema", *required}


def test_messages_on_the_page_are_those_that_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be shortened
    path = next(iter(sorted((FIRST_FOLDER / "calibration").glob("tiny-*.json"))))
    good = json.loads(path.read_text(encoding="utf-8"))
    good = {**good, "channel_coefficients": None, "channel_axis": None}
    steps = good["num_inference_steps"]
    wrong = [
        "[]",
        '{"schema": NaN}',
        " " * (MAX_FILE_BYTES + 1),
        *(
            json.dumps(data)
            for data in (
                {**good, "schema": 2},
                {key: value for key, value in good.items() if key != "dtype"},
                {**good, "sigma": 1},
                {**good, "computed_steps": [1, 2]},
                {**good, "adjusted_sigmas": good["sigmas"]},
                {**good, "computed_steps": [0, 1], "coefficients": [[1.0], *[[1.0, 0.0, 0.0]] * (steps - 1)]},
            )
        ),
    ]
    said = [message(Path("none.json"))]
    for number, text in enumerate(wrong):
        Path(f"{number}.json").write_text(text)
        said.append(message(Path(f"{number}.json")))
    table = FILE_PAGE.split("| Wrong |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"\| `(.+)` \|$", table, re.MULTILINE)) == sorted(said)


def message(path: Path) -> str:
    """What loading the file says after the file's name."""
    with pytest.raises(CalibrationError) as error:
        Calibration.load(path)
    return str(error.value).removeprefix(f"{path}: ")


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
