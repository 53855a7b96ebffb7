"""Run reproduce.sh of a model folder: the paper's table on the model that runs, with all rivals.

Ours and the rivals are calibrated and tuned on the calibration prompts, and measured on held-out ones.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compare import processes
from compare.rivals import Rival, all_rivals
from compare.study import OUR_METHODS, Study
from ertacache.cli import settings
from ertacache.cli.folder import ModelFolder
from ertacache.cli.settings import Settings
from ertacache.errors import UsageError


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 14,11,9") from None


FLAGS = (
    ("--seeds", {"type": _numbers, "default": [1000, 1001], "metavar": "S1,S2", "help": "seeds of the noise"}),
    ("--methods", {"default": "all", "metavar": "A,B", "help": "methods to run (default: all that take minutes)"}),
    ("--computed-steps", {"type": _numbers, "default": None, "metavar": "K1,K2", "help": "default: N/2, 2N/5, N/3"}),
    ("--prompts", {"default": None, "metavar": "FILE", "help": "prompts to measure on (default: held out)"}),
    ("--num-prompts", {"type": int, "default": 24, "metavar": "INT", "help": "use the first ones of the file"}),
    (
        "--layout",
        {
            "default": "plain",
            "choices": ["plain", "vbench"],
            "help": "vbench: also write every result, named for VBench",
        },
    ),
    ("--out", {"default": "reproduced", "metavar": "DIR", "help": "default: ./reproduced"}),
)

REFUSED = {  # the study sets methods and costs itself
    "--method": "use --methods A,B",
    "--speedup": "use --computed-steps K1,K2",
    "--min-psnr": "use --computed-steps K1,K2",
    "--threshold": "use --computed-steps K1,K2, the same cost for all methods",
    "--calibration": "use --calibration-folder DIR, where kept ones are looked for",
    "--prompt": "use --prompts FILE",
    "--seed": "use --seeds S1,S2",
}


def parse(folder: Path, argv: Sequence[str] | None) -> Settings:
    """Parse the settings of a comparison; UsageError for a flag of run.sh that would do nothing here."""
    return settings.parse(folder, argv, "Compare ERTACache with its rivals on this model.", FLAGS, REFUSED)


def main(folder: Path, load: Callable[[Settings], Any], model: ModelFolder, argv: Sequence[str] | None = None) -> Path:
    """Compare on the folder's model and write results.json, table.md and report.html; return the output folder."""
    chosen = parse(folder, argv)
    counts, chosen.computed_steps = chosen.computed_steps, None
    chosen.method = "none"
    chosen.command = shlex.join(["sh", "reproduce.sh", *(sys.argv[1:] if argv is None else argv)])
    rivals = _rivals(chosen.methods, model)
    path = Path(chosen.prompts) if chosen.prompts else folder / "prompts" / "held_out.txt"
    prompts = settings.read_prompts(path)[: chosen.num_prompts]
    processes.start()
    pipe = load(chosen)
    n = chosen.num_inference_steps
    counts = counts or [n // 2, 2 * n // 5, n // 3]
    for count in counts:
        if not 1 <= count <= n:
            raise UsageError(f"--computed-steps must lie between 1 and {n}, not {count}")
    pipe.set_progress_bar_config(disable=True)
    study = Study(pipe, chosen, model, prompts, counts, rivals)
    out = study.run()
    processes.stop()
    return out


def _rivals(methods: str, model: ModelFolder) -> list[Rival]:
    rivals = all_rivals(model.teacache_signal)
    if methods == "all":
        return [rival for rival in rivals if not rival.optional]
    asked = methods.split(",")
    unknown = sorted(set(asked) - {r.name for r in rivals} - set(OUR_METHODS))
    if unknown:
        known = ", ".join([*OUR_METHODS, *(r.name for r in rivals)])
        raise UsageError(f"--methods knows no {unknown[0]!r}; it knows {known}")
    return [rival for rival in rivals if rival.name in asked]
