"""What the tests of the pages share: the pages themselves, and the commands on them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS_OF_PAGES = ("", "docs/", "ERTACache4*/", "common/compare/data/")
PAGES = sorted(page for folder in FOLDERS_OF_PAGES for page in ROOT.glob(f"{folder}*.md"))
FOLDERS = sorted(ROOT.glob("ERTACache4*"))
FIRST_FOLDER = ROOT / "ERTACache4FLUX"  # which the front page's commands are given in

CHECKOUT = "ertacache"  # where `git clone` put it, whatever the folder is called here


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


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
