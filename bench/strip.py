"""The picture of a folder's README: uncached, ERTACache, the best rival at its cost, and what differs.

python bench/strip.py ERTACache4FLUX flux_tiny                      at 2/5 of the steps
python bench/strip.py ERTACache4FLUX flux_tiny --computed-steps 14
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import ertacache
from ertacache import settings
from ertacache.baselines import Tuner, all_rivals
from ertacache.files import write_atomically
from ertacache.generation import latents_run, obtain_calibration
from ertacache.metrics import psnr
from ertacache.pictures import DIFFERENCE_GAIN, difference, to_uint8
from ertacache.results import Row, best_rival, read_results

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
COLUMNS = 6
SEED = 1000  # of every prompt, as in the comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", help="of bench/results, without its ending")
    parser.add_argument("--computed-steps", type=int, help="default: 2/5 of the steps")
    args = parser.parse_args()
    folder = args.folder.resolve()
    sys.path.insert(0, str(folder))
    import generate

    rows, _ = read_results(RESULTS / f"{args.results}.json")
    count = args.computed_steps or 2 * rows[0].num_inference_steps // 5
    rival = best_rival([row for row in rows if row.asked_steps == count], "psnr")
    chosen = settings.parse(folder, ["--model", "tiny", "--computed-steps", str(count)], "")
    pipe = generate.load(chosen)
    pipe.set_progress_bar_config(disable=True)
    calibration, _ = obtain_calibration(pipe, chosen, generate.MODEL_FOLDER)
    sampler = _Sampler(pipe, generate.MODEL_FOLDER, chosen)
    with ertacache.apply(pipe, calibration):
        ours = sampler.sample()
    strips = [("ERTACache", ours)]
    if rival is not None:
        strips.append((rival.method, sampler.sample_rival(rival)))
    path = write_atomically(folder / "strip.png", _figure(sampler.sample(), strips, count, chosen.num_inference_steps))
    print(path)


class _Sampler:
    """Samples the first held-out prompts, one at a time since caches decide for a whole batch."""

    def __init__(self, pipe: Any, model: Any, chosen: Any):
        self.pipe, self.model, self.chosen = pipe, model, chosen
        self.arguments = model.arguments(chosen)
        self.prompts = settings.read_prompts(chosen.folder / "prompts" / "held_out.txt")[:COLUMNS]

    def sample(self, **overrides: Any) -> Tensor:
        """Pixels (n, 3, H, W), or of videos (n, F, 3, H, W), in [0, 1]."""
        made = []
        for prompt in self.prompts:
            generator = torch.Generator("cpu").manual_seed(SEED)
            arguments = {**self.arguments, **overrides}
            with torch.no_grad():
                made.append(
                    self.pipe(prompt=prompt, generator=generator, output_type="pt", **arguments)[0].float().cpu()
                )
        return torch.cat(made)

    def sample_rival(self, row: Row) -> Tensor:
        """The same with a rival at the setting that the comparison tuned it to."""
        rival = next(r for r in all_rivals(self.model.teacache_signal) if r.name == row.method)
        prompts = settings.read_prompts(self.chosen.path("calibration_prompts"))[: self.chosen.num_calibration_prompts]
        runs = [latents_run(self.pipe, prompt, seed, self.arguments) for seed, prompt in enumerate(prompts)]
        Tuner(self.pipe, runs[:1], self.chosen.num_inference_steps).prepare(rival, runs)
        with rival.attach(self.pipe, row.knob or {}) as overrides:
            return self.sample(**overrides)


def _figure(reference: Tensor, strips: list[tuple[str, Tensor]], count: int, steps: int) -> bytes:
    """Rows of pictures with what they are at the left; of a video the frames at the thirds of its length."""
    lines = [("uncached\n" + f"{steps} calls", reference)]
    for name, made in strips:
        lines.append((f"{name}\n{count} calls, {float(psnr(made, reference).mean()):.1f} dB", made))
        lines.append((f"its difference\nx {DIFFERENCE_GAIN}", difference(made, reference)))
    figure, axes = pyplot.subplots(
        len(lines), COLUMNS + 1, figsize=(1.5 * COLUMNS + 1.6, 1.5 * len(lines)), width_ratios=[1.1, *[1] * COLUMNS]
    )
    for (label, pictures), line in zip(lines, axes, strict=True):
        line[0].text(0.97, 0.5, label, ha="right", va="center", fontsize=10)
        for cell, picture in zip(line[1:], _still(pictures), strict=True):
            cell.imshow(to_uint8(picture), interpolation="nearest")
        for cell in line:
            cell.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _still(results: Tensor) -> list[Tensor]:
    """COLUMNS pictures: of pictures all, of videos three frames of as many as fit."""
    if results.ndim == 4:
        return list(results)
    last = results.shape[1] - 1
    frames = [0, last // 2, last]
    return [video[frame] for video in results[: COLUMNS // len(frames)] for frame in frames]


if __name__ == "__main__":
    main()
