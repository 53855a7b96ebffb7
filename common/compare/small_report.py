"""A copy of report.html that is small enough to check in: fewer examples, methods and frames; charts and tables stay.

python -m compare.small_report reproduced/report.html --out report.html
"""

import base64
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compare.pages import ResultsError
from compare.pictures import pick_frames
from compare.report import DATA, first_pairs, script_json, sprite_uri
from ertacache.cli import command
from ertacache.files import write_atomically

FRAMES, RIVALS, MAX_BYTES = 3, 3, 320_000

Pair = dict[str, Any]


def shrink(text: str, frames: int = FRAMES, rivals: int = RIVALS, max_bytes: int = MAX_BYTES) -> str:
    """Cut a report's examples and say so in it.

    Args:
        text: HTML of `write_report`.
        frames: how many of each video, spread from the first to the last one.
        rivals: how many at each cost beside ours, those of the highest mean PSNR over all examples.
        max_bytes: of the data URIs of all pictures; examples beyond it are left out, but not the first one.
    Raises ResultsError for a text that is no report.
    """
    found = re.search(r'<script type="application/json" id="examples">(.*?)</script>', text, re.DOTALL)
    if found is None:
        raise ResultsError("this is no report: it holds no examples")
    full = json.loads(found[1])["pairs"]
    kept = _best_methods(full, rivals)
    pairs = first_pairs(max_bytes, [_small_pair(pair, kept, frames) for pair in full])
    text = text[: found.start(1)] + script_json({"pairs": pairs, "note": _note(full, pairs)}) + text[found.end(1) :]
    for tag, file in (("style", "report.css"), ("script", "report.js")):  # an older report gets today's
        text = _replace_inside(text, tag, (DATA / file).read_text(encoding="utf-8"))
    return text


def _best_methods(pairs: Sequence[Pair], rivals: int) -> set[tuple[int, str]]:
    """(asked steps, method) of ours and of the `rivals` best others at each cost."""
    psnr: dict[tuple[int, bool, str], list[float]] = defaultdict(list)
    for pair in pairs:
        for shot in pair["shots"]:
            psnr[shot["asked"], shot["ours"], shot["method"]].append(shot["psnr"])
    ranked = sorted(psnr, key=lambda key: -float(np.mean(psnr[key])))
    kept = {(asked, method) for asked, ours, method in ranked if ours}
    for asked in {asked for asked, _, _ in ranked}:
        kept |= set([(cost, method) for cost, ours, method in ranked if cost == asked and not ours][:rivals])
    return kept


def _small_pair(pair: Pair, kept: set[tuple[int, str]], frames: int) -> Pair:
    """The pair with the kept methods only, and with `frames` frames of each video."""
    picked = pick_frames(pair["frames"], frames)
    shots = [
        shot | {"uri": _small_uri(shot["uri"], pair, picked)}
        for shot in pair["shots"]
        if (shot["asked"], shot["method"]) in kept
    ]
    return pair | {"uri": _small_uri(pair["uri"], pair, picked), "frames": len(picked), "shots": shots}


def _small_uri(uri: str, pair: Pair, picked: Sequence[int]) -> str:
    """The picked frames of a sprite, in the encoding of `sprite_uri`; JPEG of one frame stays as it is."""
    if not pair["pixelated"] and len(picked) == pair["frames"]:
        return uri
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as sheet:
        pixels: NDArray[np.uint8] = np.asarray(sheet.convert("RGB"))
    width = pair["width"]
    return sprite_uri([pixels[:, width * index : width * (index + 1)] for index in picked], pair["pixelated"])


def _note(full: Sequence[Pair], small: Sequence[Pair]) -> str:
    """What was left out, for the reader."""
    parts = [f"{len(small)} of {len(full)} prompts"]
    if small and small[0]["frames"] < full[0]["frames"]:
        parts.append(f"{small[0]['frames']} of {full[0]['frames']} frames")
    methods = [len({shot["method"] for shot in pairs[0]["shots"]}) for pairs in (full, small) if pairs]
    if len(methods) == 2 and methods[1] < methods[0]:
        parts.append("ours and its best rivals at each cost")
    whole = " PSNR is that of whole videos." if len(parts) > 1 and "frames" in parts[1] else ""
    return f"Shortened to {', '.join(parts)}.{whole} sh reproduce.sh makes the full report."


def _replace_inside(text: str, tag: str, inside: str) -> str:
    """The text with another content of its first <tag> without attributes."""
    return re.sub(rf"<{tag}>.*?</{tag}>", lambda _: f"<{tag}>{inside}</{tag}>", text, count=1, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 for a failure, 2 for a flag."""
    return command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = command.Parser(prog="compare.small_report", description="Shrink a report.html so that it can be kept.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"of each video (default: {FRAMES})")
    parser.add_argument("--rivals", type=int, default=RIVALS, help=f"beside ours at each cost (default: {RIVALS})")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help=f"of all pictures (default: {MAX_BYTES})")
    options = parser.parse_args(arguments)
    text = options.report.read_text(encoding="utf-8")
    small = shrink(text, options.frames, options.rivals, options.max_bytes)
    write_atomically(options.out, small)
    print(f"{options.out}: {len(small.encode()) / 1e6:.2f} of {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
