"""The picture of a folder's README: uncached, ERTACache, the best rival at its cost, and what differs.

python bench/strip.py ERTACache4FLUX flux_tiny                      at 1/3 of the steps
python bench/strip.py ERTACache4FLUX flux_tiny --computed-steps 14

Of a video model it shows frames: the first, the middle and the last one of each video.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import ertacache
from compare.pictures import DIFFERENCE_GAIN, difference, pick_frames
from compare.results import Row, best_rival, read_results
from compare.rivals import PromptRun, Tuner, all_rivals
from ertacache.cli import settings
from ertacache.cli.kept import new_calibration, obtain_calibration
from ertacache.cli.media import to_uint8
from ertacache.files import write_atomically
from ertacache.metrics import psnr

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
COLUMNS = 6
FRAMES = 3  # of a video: where it begins, is, and ends
LABEL_INCHES, DPI = 1.6, 110
SEED = 1000  # of every prompt, as in the comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", help="of bench/results, without its ending")
    parser.add_argument("--computed-steps", type=int, help="default: 1/3 of the steps")
    args = parser.parse_args()
    folder = args.folder.resolve()
    sys.path.insert(0, str(folder))
    import generate

    rows, _ = read_results(RESULTS / f"{args.results}.json")
    count = args.computed_steps or rows[0].num_inference_steps // 3
    section = [row for row in rows if row.asked_steps == count]
    rival = best_rival(section, "psnr")
    chosen = settings.parse(folder, ["--model", "tiny", "--computed-steps", str(count)], "")
    pipe = generate.load(chosen)
    pipe.set_progress_bar_config(disable=True)
    calibration, _ = obtain_calibration(pipe, chosen, generate.MODEL_FOLDER)
    sampler = _Sampler(pipe, generate.MODEL_FOLDER, chosen)
    with ertacache.apply(pipe, calibration):
        ours = sampler.sample()
    strips = [("ERTACache", count / chosen.num_inference_steps, ours)]
    if rival is not None:
        strips.append((rival.method, rival.compute_fraction, sampler.sample_rival(rival)))
    print(write_atomically(folder / "strip.webp", figure(sampler.sample(), strips)))


class _Sampler:
    """Samples the first held-out prompts, one at a time since caches decide for a whole batch."""

    def __init__(self, pipe: Any, model: Any, chosen: Any):
        self.pipe, self.model, self.chosen = pipe, model, chosen
        self.arguments = model.arguments(chosen)
        self.prompts = settings.read_prompts(chosen.folder / "prompts" / "held_out.txt")[:COLUMNS]

    def sample(self, **overrides: Any) -> Tensor:
        """Pixels (n, 3, H, W), or of videos (n, F, 3, H, W), in [0, 1]; as many as are shown."""
        made: list[Tensor] = []
        for prompt in self.prompts:
            if made and len(made) == _shown(made[0]):
                break
            generator = torch.Generator("cpu").manual_seed(SEED)
            arguments = {**self.arguments, **overrides}
            with torch.no_grad():
                made.append(
                    self.pipe(prompt=prompt, generator=generator, output_type="pt", **arguments)[0].float().cpu()
                )
        return torch.cat(made)

    def sample_rival(self, row: Row) -> Tensor:
        """The same with a rival at the setting that the comparison tuned it to."""
        if row.method == "paper":  # calibrated as the comparison does it, and nothing to tune
            chosen = settings.Settings(**{**vars(self.chosen), "method": "paper"})
            with ertacache.apply(self.pipe, new_calibration(self.pipe, chosen, self.model)):
                return self.sample()
        rival = next(r for r in all_rivals(self.model.teacache_signal) if r.name == row.method)
        count = rival.prompts or self.chosen.num_calibration_prompts
        prompts = settings.read_prompts(self.chosen.path("calibration_prompts"))[:count]
        runs = [PromptRun(self.pipe, prompt, seed, self.arguments) for seed, prompt in enumerate(prompts)]
        Tuner(self.pipe, runs[:1], self.chosen.num_inference_steps).prepare(rival, runs)
        with rival.attach(self.pipe, row.knob or {}) as overrides:
            return self.sample(**overrides)


def figure(reference: Tensor, strips: Sequence[tuple[str, float, Tensor]]) -> bytes:
    """Draw, as lossless WebP, rows of pictures with what they are at the left.

    Args:
        reference: uncached pictures (n, 3, H, W), or videos (n, F, 3, H, W), in [0, 1].
        strips: (method, cost as a fraction of the uncached run's, what it made) of each method.
    """
    lines = [("uncached", reference)]
    for name, cost, made in strips:
        quality = float(psnr(made, reference).mean())
        lines.append((f"{name}\n{cost:.0%} of the cost\n{quality:.1f} dB", made))
        lines.append((f"its difference\nto uncached, x {DIFFERENCE_GAIN}", difference(made, reference)))
    shown = [(label, _still(made)) for label, made in lines]
    columns = len(shown[0][1])
    size = (1.5 * columns + LABEL_INCHES, 1.5 * len(lines))
    drawn, axes = pyplot.subplots(len(lines), columns + 1, figsize=size, width_ratios=[1.1, *[1] * columns])
    for (label, pictures), line in zip(shown, axes, strict=True):
        line[0].text(0.95, 0.5, label, ha="right", va="center", fontsize=10)
        for cell, picture in zip(line[1:], pictures, strict=True):
            cell.imshow(to_uint8(picture), interpolation="nearest")
        for cell in line:
            cell.axis("off")
    drawn.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="webp", dpi=DPI, pil_kwargs={"lossless": True, "quality": 90, "method": 6})
    pyplot.close(drawn)
    return buffer.getvalue()


def _shown(results: Tensor) -> int:
    """How many pictures or videos of that shape fit."""
    return COLUMNS if results.ndim == 4 else COLUMNS // len(pick_frames(results.shape[1], FRAMES))


def _still(results: Tensor) -> list[Tensor]:
    """As many pictures as fit: of pictures the first ones, of videos some frames each."""
    shown = results[: _shown(results)]
    if results.ndim == 4:
        return list(shown)
    return [video[frame] for video in shown for frame in pick_frames(results.shape[1], FRAMES)]


if __name__ == "__main__":
    main()
