"""How much the embedded pipelines are like the real models: ratios of residual norms of successive steps.

    python bench/realism.py              every embedded pipeline there is
    python bench/realism.py --page       no measuring: the table of what there is, into docs/speed.md

The residual r_t is what all blocks of the transformer add at a step. MagCache publishes the mean over tokens of
||r_t|| / ||r_{t-1}|| for the real models, on one prompt in bfloat16. The same is taken here of each embedded pipeline,
on the noise grid, the number of steps and the guidance of its real model, as a mean over calibration prompts. Writes
bench/results/realism.json.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from record import RESULTS, ROOT, machine, read, write
from tiny_pipelines import FOLDERS, available, subject_name, tiny_pipeline

from compare.pages import fill, grid
from compare.rivals import MagCache, PromptRun
from compare.rivals.base import replaced
from ertacache.cli.settings import read_prompts

FIRST = 10  # ratios whose product says how fast the residual grows
SHOWN = (2, 3, 4, 5, 10, 20, 25, 30, 40)  # steps whose ratios are shown, and the last
PAGE, MARKER = ROOT / "docs" / "speed.md", "realism"
REPOSITORY = "github.com/Zehong-Ma/MagCache"

# Wan2.1-T2V-1.3B, 50 steps: of both guidance branches in turn, from the second step on
WAN = (
    *(1.0124, 1.02213, 1.00166, 1.0041, 0.99791, 1.00061, 0.99682, 0.99762, 0.99634, 0.99685, 0.99567, 0.99586),
    *(0.99416, 0.99422, 0.99578, 0.99575, 0.9957, 0.99563, 0.99511, 0.99506, 0.99535, 0.99531, 0.99552, 0.99549),
    *(0.99541, 0.99539, 0.9954, 0.99536, 0.99489, 0.99485, 0.99518, 0.99514, 0.99484, 0.99478, 0.99481, 0.99479),
    *(0.99415, 0.99413, 0.99419, 0.99416, 0.99396, 0.99393, 0.99388, 0.99386, 0.99349, 0.99349, 0.99309, 0.99304),
    *(0.9927, 0.9927, 0.99228, 0.99226, 0.99171, 0.9917, 0.99137, 0.99135, 0.99068, 0.99063, 0.99005, 0.99003),
    *(0.98944, 0.98942, 0.98849, 0.98849, 0.98758, 0.98757, 0.98644, 0.98643, 0.98504, 0.98503, 0.9836, 0.98359),
    *(0.98202, 0.98201, 0.97977, 0.97978, 0.97717, 0.97718, 0.9741, 0.97411, 0.97003, 0.97002, 0.96538, 0.96541),
    *(0.9593, 0.95933, 0.95086, 0.95089, 0.94013, 0.94019, 0.92402, 0.92414, 0.90241, 0.9026, 0.86821, 0.86868),
    *(0.81838, 0.81939),
)
# Open-Sora 1.2, 30 steps; the evaluation script takes their square roots, which smooths them
OPENSORA = (
    *(0.93359, 0.96484, 0.99609, 1.0, 0.99609, 0.99609, 0.99219, 1.0, 1.0, 0.99609, 0.99219, 1.0, 0.99219, 0.99609),
    *(0.99219, 0.99609, 0.99609, 0.99609, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98438, 0.98438, 0.97656),
    *(0.97656, 0.96484, 0.96484),
)


@dataclass(frozen=True)
class Real:
    """The real model of a pipeline.

    Attributes:
        flags: of the folder's command, for its grid and guidance.
        sizes: arguments of the scheduler's `set_timesteps`, where its grid depends on the size of the results.
        ratios: published ones, from the second step on; empty where none were found.
        source: where.
    """

    flags: tuple[str, ...]
    sizes: dict[str, Any] = field(default_factory=dict)
    ratios: tuple[float, ...] = ()
    source: str = "none found"


REAL = {
    "flux": Real(
        ("--num-inference-steps", "28", "--guidance-scale", "3.5"),
        {"mu": 1.15},  # of 4096 tokens
        tuple(float(ratio) for ratio in FLUX_MAG_RATIOS[1:]),
        "diffusers.hooks.mag_cache.FLUX_MAG_RATIOS",
    ),
    "wan": Real(
        ("--num-inference-steps", "50", "--flow-shift", "8", "--guidance-scale", "6"),  # as advised for 1.3B
        {},
        tuple(np.mean(np.reshape(WAN, (-1, 2)), axis=1).tolist()),
        f"{REPOSITORY}, MagCache4Wan2.1/magcache_generate.py",
    ),
    "cogvideox": Real(("--num-inference-steps", "50", "--guidance-scale", "6")),
    "opensora": Real(
        ("--num-inference-steps", "30", "--guidance-scale", "7"),
        {"height": 480, "width": 854, "num_frames": 51},
        OPENSORA,
        f"{REPOSITORY}, eval/magcache/experiments/opensora.py",
    ),
}


@contextmanager
def on_real_grid(pipe: Any, sizes: dict[str, Any]) -> Iterator[None]:
    """Set the scheduler's grid as for the real model's sizes, whatever the pipeline says."""
    set_timesteps = pipe.scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines look at the signature
    def setting(*args: Any, **kwargs: Any) -> Any:
        return set_timesteps(*args, **{**kwargs, **sizes})

    with replaced(pipe.scheduler, "set_timesteps", setting):
        yield


def measure(name: str, prompts: int) -> dict[str, Any]:
    """The ratios of one embedded pipeline, and how they compare."""
    real = REAL[name]
    pipe, chosen, module = tiny_pipeline(name, *real.flags)
    arguments = module.MODEL_FOLDER.arguments(chosen)
    texts = read_prompts(chosen.path("calibration_prompts"))[:prompts]
    runs = [PromptRun(pipe, text, seed, arguments) for seed, text in enumerate(texts)]
    recorder = MagCache()
    with torch.no_grad(), on_real_grid(pipe, real.sizes):
        recorder.prepare(pipe, runs, chosen.num_inference_steps)
    ratios = (recorder.mag_ratios or [])[1:]
    made = {"ratios": ratios, "product": float(np.prod(ratios[:FIRST])), "grid": " ".join(real.flags), **real.sizes}
    return {
        "model": subject_name(name),
        "embedded": made,
        "published": {"ratios": list(real.ratios), "source": real.source, **published(ratios, real.ratios)},
    }


def published(ratios: Sequence[float], known: Sequence[float]) -> dict[str, float]:
    """Product of the first published ratios, and their correlation with ours."""
    if not known:
        return {}
    return {"product": float(np.prod(known[:FIRST])), "correlation": float(np.corrcoef(ratios, known)[0, 1])}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: two lines a pipeline, the published ratios and the embedded pipeline's."""
    steps = [step for step in SHOWN if step <= max(len(row["embedded"]["ratios"]) for row in rows)]
    header = ["Model", "Ratios", *map(str, steps), "last", f"product of {FIRST}", "correlation"]
    lines = []
    for row in rows:
        for kind in ("published", "embedded"):
            ratios, found = row[kind]["ratios"], row["published"].get("correlation")
            # step 2 of the run has the first ratio
            cells = [f"{ratios[step - 2]:.3f}" if step - 2 < len(ratios) - 1 else "" for step in steps]
            last, product = (f"{ratios[-1]:.3f}", f"{row[kind]['product']:.2f}") if ratios else ("none found", "")
            beside = f"{found:.2f}" if kind == "embedded" and found is not None else ""
            lines.append([row["model"].removesuffix(" tiny"), kind, *cells, last, product, beside])
    return grid(header, lines, left=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=available(), help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("--prompts", type=int, default=8, help="calibration prompts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="put the table of what there is into docs/speed.md")
    options = parser.parse_args(argv)
    if not options.page:
        rows = [measure(name, options.prompts) for name in options.models]
        about = {"prompts": options.prompts, **machine(torch.device("cpu"), torch.float32)}
        write("realism", {"rows": rows, **about}, options.out)
    for found in read("realism", options.out) if options.page else []:
        fill(PAGE, table(found["rows"]), MARKER)


if __name__ == "__main__":
    sys.exit(main())
