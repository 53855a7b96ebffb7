"""report.html: one file with pictures, charts and tables of a comparison, which needs no network to be read."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compare.chart_data import AXES, CHARTED, curve_at, rival_styles
from compare.pictures import pick_frames
from compare.report_svg import error_svg, quality_svg, schedule_svg
from compare.results import METRICS, Curve, Row
from compare.table import Table, all_tables, load_published, margins
from ertacache.files import write_atomically

DATA = Path(__file__).with_name("data")  # its parts: style, script, template
_WIDE, _NARROW = 820, 380
# Larger pictures and longer videos are shown smaller and with fewer frames: a report is to be mailed around.
_MAX_SIDE, _MAX_VIDEO_SIDE, _MAX_FRAMES = 640, 416, 24
_LOSSLESS_SIDE = 256
MAX_BYTES = 9 << 20


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    examples: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Curve | Sequence[Curve]],
    meta: Mapping[str, Any],
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write the report of one model's rows.

    examples: dicts with prompt (str), seed (int), method (str; "none" is the uncached picture), computed_steps (the
    asked number of computed steps, or a list of them; None for "none") and image, uint8 of shape (H, W, 3) or, for a
    video, (F, H, W, 3). curves: per method one `Curve`, or one for each asked number of steps. meta: `title` becomes
    the heading, all the rest is listed at the end. max_bytes: of the data URIs of all pictures; examples beyond it are
    left out, from the last one on, but not the first.
    Raises ValueError for rows of several models, an example without its uncached picture, or unlike shapes.
    """
    if len({row.model for row in rows}) != 1:
        raise ValueError("rows: expected the rows of one model")
    asked = sorted({row.asked_steps for row in rows if row.asked_steps}, reverse=True)
    parts = {
        "css": (DATA / "report.css").read_text(encoding="utf-8"),
        "js": (DATA / "report.js").read_text(encoding="utf-8"),
        "title": escape(str(meta.get("title", "ERTACache beside its rivals"))),
        "ran_on": escape(_ran_on(rows)),
        "cards": "".join(_card(rows, steps) for steps in asked),
        "examples": script_json({"pairs": first_pairs(max_bytes, _pairs(examples, rows))}),
        "charts": _charts(rows),
        "steps": "".join(_steps_panel(rows, curves, steps) for steps in asked),
        "tables": "".join(_table_html(table) for table in all_tables(rows, load_published())),
        "meta": _meta_html(rows, meta),
    }
    template = (DATA / "report_template.html").read_text(encoding="utf-8")
    # one pass, so that text which looks like a place holder is left alone
    text = re.sub(r"<!--@(\w+)@-->|/\*@(\w+)@\*/", lambda m: parts[m[1] or m[2]], template)
    write_atomically(path, text)


def _ran_on(rows: Sequence[Row]) -> str:
    row = next((r for r in rows if r.role == "ours"), rows[0])
    return (
        f"{row.model} on {row.device}, {row.dtype}, {row.num_inference_steps} steps. Measured over {row.n} prompt "
        f"and seed pairs, each against the uncached output."
    )


def _card(rows: Sequence[Row], asked: int) -> str:
    """The headline of one asked number of computed steps."""
    section = [row for row in rows if row.asked_steps == asked]
    ours = next((row for row in section if row.role == "ours"), None)
    if ours is None:
        return ""
    margin = next((m for m in margins(section) if m[0] == "PSNR"), None)
    beaten = f"<p><b>{escape(margin[1])}</b> over {escape(margin[2])}, best rival at that cost</p>" if margin else ""
    psnr = METRICS["psnr"].show(ours.psnr) if ours.psnr is not None else "\N{EN DASH}"
    return (
        f'<article class="card"><h3>{asked} of {ours.num_inference_steps} steps computed</h3>'
        f'<p class="big">{psnr}<small> dB PSNR</small></p><p><b>{ours.speedup:.2f}×</b> as fast at '
        f"{ours.compute_fraction:.0%} of the FLOPs</p>{beaten}</article>"
    )


def _pairs(examples: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The examples by prompt and seed, with pictures as data URIs, in the form that report.js reads."""
    ours = {row.method for row in rows if row.role == "ours"}
    pairs: dict[tuple[str, int], dict[str, Any]] = {}
    references: dict[tuple[str, int], NDArray[np.uint8]] = {}
    for example in examples:
        if example["method"] == "none":
            key, image = (example["prompt"], example["seed"]), _frames(example)
            references[key] = image
            sprite, size = _sprite(image)
            pairs[key] = {"prompt": key[0], "seed": key[1], "uri": sprite, **size, "shots": []}
    for example in examples:
        key = (example["prompt"], example["seed"])
        if example["method"] == "none":
            continue
        if key not in references:
            raise ValueError(f"examples: no uncached picture (method none) of {key[0]!r:.60}, seed {key[1]}")
        image = _frames(example)
        if image.shape != references[key].shape:
            raise ValueError(f"examples: {example['method']}: shape {image.shape}, uncached {references[key].shape}")
        steps = example["computed_steps"]
        pairs[key]["shots"].append(
            {
                "method": example["method"],
                "ours": example["method"] in ours,
                "uri": _sprite(image)[0],
                "asked": steps if isinstance(steps, int) else len(steps),
                "psnr": _psnr(image, references[key]),
            }
        )
    for pair in pairs.values():
        pair["shots"].sort(key=lambda shot: (-shot["asked"], not shot["ours"], -shot["psnr"]))
    return list(pairs.values())


def first_pairs(limit: int, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first pairs whose data URIs together stay below `limit` bytes, at least one of them."""
    sizes = [len(pair["uri"]) + sum(len(shot["uri"]) for shot in pair["shots"]) for pair in pairs]
    return [pair for index, pair in enumerate(pairs) if index == 0 or sum(sizes[: index + 1]) <= limit]


def _frames(example: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The example's picture as (F, H, W, 3)."""
    image = np.asarray(example["image"])
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(
            f"examples: image of {example['method']}: expected uint8 (H, W, 3) or (F, H, W, 3), got "
            f"{image.dtype} {image.shape}"
        )
    return image if image.ndim == 4 else image[None]


def _sprite(frames: NDArray[np.uint8]) -> tuple[str, dict[str, Any]]:
    """All frames side by side as one data URI, and its {frames, width, height, pixelated}; frames (F, H, W, 3)."""
    frames = frames[pick_frames(len(frames), _MAX_FRAMES)]
    count, height, width, _ = frames.shape
    small = max(height, width) <= _LOSSLESS_SIDE
    side = min(1.0, (_MAX_SIDE if count == 1 else _MAX_VIDEO_SIDE) / max(height, width))
    size = (max(1, round(width * side)), max(1, round(height * side)))
    shown = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    return sprite_uri(shown, small), {"frames": count, "width": size[0], "height": size[1], "pixelated": small}


def sprite_uri(frames: Sequence[NDArray[np.uint8]], lossless: bool) -> str:
    """Frames (H, W, 3) side by side as one data URI; lossless where differences are shown 32 times as strong."""
    data = io.BytesIO()
    kind = "webp" if lossless else "jpeg"
    options = {"lossless": 1, "quality": 50, "method": 4} if lossless else {"quality": 92, "subsampling": 0}
    Image.fromarray(np.concatenate(frames, axis=1)).save(data, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode()


def _psnr(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """PSNR in dB of what is shown, from 8-bit pixels; identical pictures count as 120."""
    error = np.mean((image.astype(np.float64) - reference) ** 2) / 255**2
    return 120.0 if error == 0 else round(-10 * math.log10(error), 2)


def _charts(rows: Sequence[Row]) -> str:
    """Quality against speed-up, one figure for each metric and axis; report.js shows one of them."""
    figures = []
    measured = [m for m in CHARTED if m in METRICS or any(getattr(row, m) is not None for row in rows)]
    for metric, facts in ((m, CHARTED[m]) for m in measured):
        for axis in AXES:
            wide, narrow = (quality_svg(rows, metric, axis, width) for width in (_WIDE, _NARROW))
            empty = f'<p class="quiet">{facts.label} was not measured.</p>'
            body = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>' if wide else empty
            hidden = "" if (metric, axis) == ("psnr", next(iter(AXES))) else " hidden"
            names = f'data-metric="{metric}" data-label="{facts.label}" data-axis="{axis}"'
            figures.append(f"<figure {names}{hidden}>{body}</figure>")
    return "".join(figures)


def _steps_panel(rows: Sequence[Row], curves: Mapping[str, Curve | Sequence[Curve]], asked: int) -> str:
    """Error per step and the schedule strips at one asked number of computed steps."""
    styles = dict.fromkeys(curves, 5) | rival_styles(rows)
    chosen = curve_at(curves, asked)
    section = [row for row in rows if row.asked_steps == asked and row.role in ("ours", "rival")]
    num_steps = next((r.num_inference_steps for r in section if r.role == "ours"), 0)
    # a rival that takes fewer steps has another grid: a strip of its own length would not line up
    strips = [
        (r.method, r.computed_steps, styles[r.method])
        for r in section
        if r.computed_steps is not None and r.num_inference_steps == num_steps
    ]
    strips.sort(key=lambda strip: strip[2] >= 0)
    body = []
    for kind, width in (("wide", _WIDE), ("narrow", _NARROW)):
        error = error_svg(chosen, styles, width) if chosen else '<p class="quiet">No errors were recorded.</p>'
        schedule = schedule_svg(strips, num_steps, width) if strips else ""
        body.append(f'<div class="{kind}">{error}<h3>Which steps are computed</h3>{schedule}</div>')
    return f'<figure data-asked="{asked}" hidden>{"".join(body)}</figure>'


def _table_html(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    lines = []
    for index, line in enumerate(table.lines):
        kind = ' class="ours"' if index in table.ours else ""
        first, *rest = line
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    remarks = "".join(f'<p class="remark">{escape(remark)}</p>' for remark in table.remarks)
    footer = remarks + (f"<ol>{notes}</ol>" if notes else "")
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{footer}"
    )


def _meta_html(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    row = next((r for r in rows if r.role == "ours"), rows[0])
    facts = {
        "Seeds": ", ".join(map(str, row.seeds)),
        "Prompts (SHA-256)": row.prompts_sha256,
        "Versions": ", ".join(f"{k} {v}" for k, v in row.versions.items()),
    }
    if row.setting:
        facts["Setting"] = row.setting
    facts |= {key.replace("_", " ").capitalize(): value for key, value in meta.items() if key != "title"}
    return "".join(f"<dt>{escape(k)}</dt><dd>{escape(_plain(v))}</dd>" for k, v in facts.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
