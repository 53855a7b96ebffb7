"""Measure `ertacache.enable` on the tiny pipelines:

    python bench/enable.py [flux wan cogvideox opensora]
    python bench/enable.py --page    only put the table into docs/enable.md (part of make figures)

Each model makes four results under `enable`, which are watched, then others, which are accelerated; a second process
makes one more with what the first has stored; and `calibrate` on the same four prompts is applied to the same others.
Writes bench/results/enable_MODEL.json.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, machine, read, write
from tiny_pipelines import available, subject_name, tiny_pipeline
from tqdm import tqdm

import ertacache
from compare.pages import fill, grid
from ertacache.auto.handle import MEMORY_LIMIT, SAMPLES
from ertacache.cli.settings import read_prompts
from ertacache.metrics import psnr

PAGE = ROOT / "docs" / "enable.md"
MARKER = "enable"
PICTURES = 10  # within which it should have paid


class Subject:
    """A tiny pipeline whose calls and transformer evaluations are counted."""

    def __init__(self, name: str, steps: int | None):
        self.pipe, chosen, module = tiny_pipeline(name)
        self.arguments = module.MODEL_FOLDER.arguments(chosen)
        self.arguments["num_inference_steps"] = self.steps = steps or chosen.num_inference_steps
        self.watched = read_prompts(chosen.path("calibration_prompts"))[:SAMPLES]
        self.others = read_prompts(chosen.folder / "prompts" / "held_out.txt")
        self.micro_batch, self.evaluations = chosen.micro_batch, 0
        # of a block: the forward of the whole is entered on reused steps too
        blocks = next(part for part in self.pipe.transformer.modules() if isinstance(part, torch.nn.ModuleList))
        blocks[0].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.evaluations += 1

    def make(self, prompt: str, seed: int) -> torch.Tensor:
        noise = torch.Generator("cpu").manual_seed(seed)
        return torch.as_tensor(self.pipe(prompt=prompt, generator=noise, output_type="pt", **self.arguments)[0])

    def counted(self, prompt: str, seed: int) -> tuple[torch.Tensor, int, float]:
        """A result, its evaluations and its seconds."""
        before, began = self.evaluations, time.perf_counter()
        result = self.make(prompt, seed)
        return result, self.evaluations - before, time.perf_counter() - began


def measured(name: str, others: int, speedup: float, steps: int | None) -> dict[str, Any]:
    one = Subject(name, steps)
    pairs = [(prompt, 1000 + i) for i, prompt in enumerate(one.others[:others])]
    watched = [(prompt, i) for i, prompt in enumerate(one.watched)]
    bar = tqdm(total=3 * others + 2 * SAMPLES + 1, unit="result", desc=name, mininterval=1)

    def counted(pair: tuple[str, int]) -> tuple[torch.Tensor, int, float]:
        bar.update()
        return one.counted(*pair)

    plain = [counted(pair) for pair in watched]
    references = [counted(pair)[0] for pair in pairs]
    uncached = plain[0][1]
    with tempfile.TemporaryDirectory() as store:
        with ertacache.enable(one.pipe, speedup=speedup, store=store, progress=False) as enabled:
            seen = [counted(pair) for pair in watched]
            fit = seen[-1][1] - uncached
            bytes_watched = sum(part.nbytes for known in enabled._known.values() for part in known.watched)
            accelerated = [counted(pair) for pair in pairs]
            status = enabled.status()[0]
        command = [sys.executable, __file__, name, "--second", store, "--speedup", str(speedup)]
        if steps:
            command += ["--steps", str(steps)]
        space = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=space)
        second = json.loads(done.stdout.splitlines()[-1])
        bar.update()
    asked = {"speedup": speedup, "effort": "fast", "progress": False, "micro_batch": one.micro_batch}
    made = ertacache.calibrate(one.pipe, one.watched, seeds=range(SAMPLES), **asked, **one.arguments)
    with ertacache.apply(one.pipe, made):
        calibrated = [counted(pair)[0] for pair in pairs]
    bar.close()
    assert status.calibration is not None
    after, mine, theirs = (
        accelerated[0][1],
        [mean(a[0], r) for a, r in zip(accelerated, references, strict=True)],
        [mean(c, r) for c, r in zip(calibrated, references, strict=True)],
    )
    saved = uncached - after
    return {
        "subject": subject_name(name),
        "num_inference_steps": one.steps,
        "computed_steps": status.calibration.computed_steps,
        "watched_equal": [torch.equal(s[0], p[0]) for s, p in zip(seen, plain, strict=True)],
        "evaluations": {
            "uncached": uncached,
            "watched": [s[1] for s in seen[:-1]],
            "fit": fit,
            "accelerated": [a[1] for a in accelerated],
            "ten_results": SAMPLES * uncached + fit + (PICTURES - SAMPLES) * after,
            "ten_uncached": PICTURES * uncached,
        },
        "break_even_results": SAMPLES + -(-fit // saved),
        "psnr": sum(mine) / len(mine),
        "psnr_calibrate": sum(theirs) / len(theirs),
        "psnr_difference": sum(mine) / len(mine) - sum(theirs) / len(theirs),
        "psnr_on_the_watched": status.calibration.settings.get("fitted_psnr"),
        "held_out": len(pairs),
        "seconds_each": {
            "uncached": sum(p[2] for p in plain) / SAMPLES,
            "watched": sum(s[2] for s in seen[:-1]) / (SAMPLES - 1),
            "fit": seen[-1][2] - sum(s[2] for s in seen[:-1]) / (SAMPLES - 1),
            "accelerated": sum(a[2] for a in accelerated) / len(accelerated),
        },
        "second_process": {
            "evaluations": second["evaluations"],
            "equal": second["sha256"] == digest(accelerated[0][0]),
        },
        "bytes_watched": bytes_watched,
        "memory_limit": MEMORY_LIMIT,
    }


def mean(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float(psnr(result, reference).mean())


def digest(result: torch.Tensor) -> str:
    return hashlib.sha256(result.numpy().tobytes()).hexdigest()


def second(name: str, store: str, speedup: float, steps: int | None) -> None:
    """What another process does with the store of the first."""
    one = Subject(name, steps)
    ertacache.enable(one.pipe, speedup=speedup, store=store, progress=False)
    result, evaluations, _ = one.counted(one.others[0], 1000)
    print(json.dumps({"evaluations": evaluations, "sha256": digest(result)}))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: what was measured, a row for each model."""
    header = ["Model", "Computed", "enable, dB", "calibrate, dB", "Fit, uncached results", "Ten results", "Pays from"]
    rows = []
    for record in records:
        made, steps = record["evaluations"], record["num_inference_steps"]
        rows.append(
            [
                record["subject"],
                f"{len(record['computed_steps'])} of {steps}",
                f"{record['psnr']:.2f}",
                f"{record['psnr_calibrate']:.2f}",
                f"{made['fit'] / made['uncached']:.1f}",
                f"{made['ten_results']} of {made['ten_uncached']} calls",
                f"result {record['break_even_results'] + 1}",
            ]
        )
    about = ", ".join(f"{record['subject']} {record['held_out']}" for record in records)
    return f"Held-out results ({about}), on a CPU:\n\n{grid(header, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure enable on the tiny pipelines.")
    parser.add_argument("models", nargs="*", default=available(), metavar="MODEL")
    parser.add_argument("--held-out", type=int, default=8, help="results after the watched ones")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="instead of the model's own")
    parser.add_argument("--second", metavar="STORE", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="measure nothing: put the table into docs/enable.md")
    chosen = parser.parse_args()
    if chosen.page:
        fill(PAGE, table(read("enable_*")), MARKER)
        return 0
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    for name in chosen.models:
        if chosen.second:
            second(name, chosen.second, chosen.speedup, chosen.steps)
            continue
        result = measured(name, chosen.held_out, chosen.speedup, chosen.steps)
        write(f"enable_{name}", {**machine(torch.device("cpu"), torch.float32), **result}, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
