"""Does a calibration carry over? Prompts of another kind than those it saw, and texts that are no captions at all.

    python bench/carry_over.py

On the tiny FLUX pipeline: calibrated on captions of faces and measured on captions of vehicles; calibrated as always
and measured on texts that describe no picture. Rivals are tuned and fitted on the same
prompts as ours. Writes bench/results/carry_over.json and the table in docs/speed.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, machine, read, write
from tiny_pipelines import FOLDERS, subject_name, tiny_module

from compare import reproduce
from compare.pages import fill, grid
from ertacache.cli.settings import read_prompts
from tiny_training.emoji import BACKGROUNDS, caption, is_held_out, load_subjects

PAGE, MARKER = ROOT / "docs" / "speed.md", "carry-over"
VEHICLES = (
    *("a rocket", "a helicopter", "a bus", "a fire engine", "a police car", "a red car", "a tractor", "a bicycle"),
    *("a motorcycle", "a racing car", "an airplane", "a sailboat"),
)
NO_CAPTIONS = (
    "!",
    "?????",
    "asdf qwer zxcv",
    "0 1 1 2 3 5 8 13",
    "of the and a in to",
    "left left left left left left",
    "background background",
    "under no circumstances",
    "the meeting was moved to Thursday",
    "please send me the invoice by mail",
    "to be or not to be, that is the question",
    "import torch",
    "rocket of the on green light with skin birthday background a running",
    "yellow? no, never again",
    "she sold the house and bought a boat",
    "a photograph of a cat asleep on a keyboard",
)
KINDS = {"vehicles, calibrated on faces": "vehicles", "no captions": "texts"}
METHODS = "ertacache,ertacache-best,seacache,taylorseer-lite,oss,learned-solver"


def faces() -> list[str]:
    """Captions of faces, as they were trained on, each with another background."""
    phrases = [subject.phrase for subject in load_subjects("stills")]
    return captions([phrase for phrase in phrases if "face" in phrase.split()], held_out=False)


def vehicles() -> list[str]:
    """Captions of vehicles on backgrounds that they were never trained on, then on others."""
    return [*captions(VEHICLES, held_out=True), *captions(VEHICLES, held_out=False)]


def captions(phrases: Sequence[str], held_out: bool) -> list[str]:
    """Of each subject one."""
    subjects = [subject.phrase for subject in load_subjects("stills")]
    made = []
    for number, phrase in enumerate(phrases):
        subject = subjects.index(phrase)
        fitting = [name for i, name in enumerate(BACKGROUNDS) if is_held_out(subject, i) == held_out]
        made.append(caption(phrase, colour=fitting[number % len(fitting)]))
    return made


def compare(kind: str, methods: str, counts: str, work: Path, held_out: int) -> list[dict[str, Any]]:
    """Rows of a comparison on prompts of a kind."""
    folder, module = FOLDERS["flux"], tiny_module("flux")
    calibrating = read_prompts(folder / "prompts" / "calibration.txt")
    held = list(NO_CAPTIONS)
    if kind == "vehicles":
        calibrating, held = faces(), vehicles()
    work.mkdir(parents=True, exist_ok=True)
    files = {"calibration-prompts": calibrating, "prompts": held[:held_out]}
    flags = ["--model", "tiny", "--methods", methods, "--computed-steps", counts, "--out", str(work)]
    for name, prompts in files.items():
        (work / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        flags += [f"--{name}", str(work / f"{name}.txt")]
    # calibrations of the folder are for its own prompts
    flags += ["--calibration-folder", str(work / "calibration")]
    reproduce.main(folder, module.load, module.MODEL_FOLDER, flags)
    rows = json.loads((work / "results.json").read_text(encoding="utf-8"))
    return [{"kind": kind, **row} for row in rows if row["role"] != "reference"]


def table(record: dict[str, Any]) -> str:
    """Markdown: a line a method, a column a kind of prompts and number of computed steps."""
    rows = record["rows"]
    counts = sorted({row["asked_steps"] for row in rows}, reverse=True)
    columns = [(title, kind, count) for title, kind in KINDS.items() for count in counts]
    header = ["", *(f"{title}, {count} of {record['num_inference_steps']}" for title, _, count in columns)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {(row["kind"], row["asked_steps"]): row for row in rows if row["method"] == method}
        cells = [found.get((kind, count)) for _, kind, count in columns]
        lines.append([method, *(f"{cell['psnr']:.1f} ({cell['psnr_p10']:.1f})" if cell else "–" for cell in cells)])
    lines.sort(key=lambda line: (not line[0].startswith("ertacache"), line[0]))
    pairs = {title: next(row["n"] for row in rows if row["kind"] == kind) for title, kind in KINDS.items()}
    said = ", ".join(f"{title} {count}" for title, count in pairs.items())
    return (
        f"{record['model']}, PSNR in dB (worst decile) to the uncached pictures. Pairs of prompt and seed: {said}.\n\n"
        f"{grid(header, lines)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--computed-steps", default="14,11,9")
    parser.add_argument("--held-out", type=int, default=16, help="prompts of each kind, two seeds each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ertacache-carry-over")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="put the table of what there is into docs/speed.md")
    parser.add_argument("--check", action="store_true", help="with --page: change nothing, exit 1 if the page differs")
    options = parser.parse_args(argv)
    if not options.page:
        rows = [
            row
            for kind in KINDS.values()
            for row in compare(kind, options.methods, options.computed_steps, options.work / kind, options.held_out)
        ]
        record = {
            "model": subject_name("flux"),
            "num_inference_steps": rows[0]["num_inference_steps"],
            "no_captions": list(NO_CAPTIONS),
            "rows": rows,
            **machine(torch.device("cpu"), torch.float32),
        }
        write("carry_over", record, options.out)
    for found in read("carry_over", options.out) if options.page else []:
        fill(PAGE, table(found), MARKER, options.check)


if __name__ == "__main__":
    sys.exit(main())
