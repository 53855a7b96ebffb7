"""The text of something that may hold HTML, as BeautifulSoup with html.parser gives it (`.text`).

Written on the standard library's parser, which is the one that BeautifulSoup drives there, so that captions need
no further package. What it does beside joining the text: comments, declarations and the contents of script,
style, template and ruby annotations do not count, and numeric references below 256 are read as windows-1252.
"""

from html.entities import name2codepoint
from html.parser import HTMLParser

HIDDEN = frozenset({"script", "style", "template", "rt", "rp"})


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing is inside."""

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not HIDDEN.intersection(self.open):
            self.parts.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(_character(int(name[1:], 16) if name[0] in "xX" else int(name)))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(chr(name2codepoint[name]) if name in name2codepoint else f"&{name}")

    def unknown_decl(self, data: str) -> None:
        if data.upper().startswith("CDATA["):
            self.parts.append(data[len("CDATA[") :])  # counts wherever it stands


def _character(code: int) -> str:
    if 0 < code < 256:
        try:
            return bytes([code]).decode("windows-1252")
        except UnicodeDecodeError:
            pass
    try:
        character = chr(code or -1)  # nor is 0 one
        character.encode()  # surrogates are no characters
    except (ValueError, OverflowError):
        return "\N{REPLACEMENT CHARACTER}"
    return character


def text_of(markup: str) -> str:
    """The text in `markup`; what no parser takes comes back as it is."""
    parser = _Text()
    try:
        parser.feed(markup)
        parser.close()
    except AssertionError:  # what html.parser raises for a malformed declaration such as "<![x"
        return markup
    return "".join(parser.parts)
