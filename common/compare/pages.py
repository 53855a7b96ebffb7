"""Fill the generated parts of pages, between two markers, or check them."""

from collections.abc import Sequence
from pathlib import Path

from ertacache.errors import ERTACacheError


class ResultsError(ERTACacheError, ValueError):
    """Results cannot be read, or a page or figure differs from them."""


def grid(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Write a Markdown table; the first `left` columns are text, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def markers(name: str) -> tuple[str, str]:
    """The two comments around a generated part."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def replace_between(text: str, content: str, name: str) -> str:
    """Return `text` with `content` between its two markers; ValueError unless they are there once and in order."""
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the markers {begin} and {end}, once each")
    return f"{text[: text.index(begin)]}{begin}\n\n{content.strip()}\n\n{text[text.index(end) :]}"


def fill(page: Path, content: str, name: str, check: bool = False) -> None:
    """Put `content` between the markers of a page; with `check`, change nothing.

    Raises:
        ResultsError: the markers are not there, or with `check` something else stands between them.
    """
    before = page.read_text(encoding="utf-8")
    try:
        after = replace_between(before, content, name)
    except ValueError as error:
        raise ResultsError(f"{page}: {error}") from None
    if check and before != after:
        raise ResultsError(f"{page} differs from the results: run make figures")
    if before != after:
        page.write_text(after, encoding="utf-8")
