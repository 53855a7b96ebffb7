"""Caption cleaning: what captions of the training data went through, so prompts go through it too.

The rules are those of Open-Sora 1.2 as its users know them, in their order; the comments number them so. Each
is a pattern and what replaces it, where it is nothing else. Patterns know Unicode's letters, digits and spaces.
"""

import html
import re
from urllib.parse import unquote_plus

import ftfy

from .html_text import text_of

Rules = tuple[tuple[re.Pattern[str], str], ...]

TOP_LEVEL_DOMAINS = "com|co|ru|net|org|edu|gov|it"
EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
IDEOGRAPHS = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
PUNCTUATION = r"#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*"
MAX_DASHES = 3  # more than that in one caption, and they stand for spaces


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _addresses(scheme: str) -> str:
    """Either the prefix alone of an address with a scheme, or a bare address to its end."""
    bare = rf"[a-zA-Z0-9.\-]+\.(?:{TOP_LEVEL_DOMAINS})[\w/\-]*\b/?(?!@)"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{bare})"


ADDRESSES = _rules((_addresses("https?"), ""), (_addresses("www"), ""))  # 2
CHARACTERS = _rules(
    (r"@\w+\b", ""),  # 4 nicknames
    (f"[{IDEOGRAPHS}]", ""),  # 5
    (f"[{DASHES}]+", "-"),  # 6
    ("[`´«»“”¨]", '"'),  # 7
    ("[‘’]", "'"),
    ("&quot;?", ""),  # 8
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # 9 network addresses, times of day, written line ends
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),  # 10 numbers that say nothing
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{EXTENSIONS})", ""),  # 11 file names
    (r"[\"']{2,}", '"'),  # 12
    (r"\.{2,}", " "),
    (f"[{PUNCTUATION}]+", " "),  # 13
    (r"\s+\.\s+", " "),
)
DASH = re.compile(r"[-_]")  # 14
WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # 16 serial numbers
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),  # 17 words of shops
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{EXTENSIONS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # 18 more of them, and sizes
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),  # 19
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # 20
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_once(caption: str) -> str:
    """One pass of the rules."""
    caption = unquote_plus(str(caption)).strip().lower().replace("<person>", "person")  # 1
    caption = text_of(_apply(ADDRESSES, caption))  # 2, 3
    caption = _apply(CHARACTERS, caption)
    if len(DASH.findall(caption)) > MAX_DASHES:
        caption = DASH.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()  # 15
    return _apply(ENDS, _apply(WORDS, caption)).strip()


def clean_caption(caption: str, passes: int = 2) -> str:
    """A caption as the text encoder is to see it.

    Args:
        passes: the original cleans twice; 0 only strips and lowers the case, as it does with cleaning off.
    """
    if passes == 0:
        return caption.lower().strip()
    for _ in range(passes):
        caption = clean_once(caption)
    return caption


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
