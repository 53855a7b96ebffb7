"""The picture of a folder's README: uncached, ERTACache, difference: `python bench/strip.py FOLDER`."""

import argparse
import sys
from pathlib import Path

import torch

import ertacache
from ertacache import settings
from ertacache.files import write_atomically
from ertacache.generation import obtain_calibration
from ertacache.pictures import difference, png_bytes

COLUMNS = 6
GAP = 2
ENLARGE = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    sys.path.insert(0, str(folder))
    import generate

    chosen = settings.parse(folder, ["--model", "tiny"], "")
    pipe = generate.load(chosen)
    calibration, _ = obtain_calibration(pipe, chosen, generate.MODEL_FOLDER)
    prompts = settings.read_prompts(folder / "prompts" / "held_out.txt")[:COLUMNS]
    arguments = generate.MODEL_FOLDER.arguments(chosen)

    def sample() -> torch.Tensor:
        generators = [torch.Generator("cpu").manual_seed(1000) for _ in prompts]
        with torch.no_grad():
            return pipe(prompt=prompts, generator=generators, output_type="pt", **arguments)[0].float().cpu()

    reference = sample()
    with ertacache.apply(pipe, calibration):
        cached = sample()
    rows = [_row(p) for p in (reference, cached, difference(cached, reference))]
    path = write_atomically(folder / "strip.png", png_bytes(torch.cat(rows, dim=1), ENLARGE))
    print(path)


def _row(pictures: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) -> (3, H + gap, n (W + gap)), white between the pictures."""
    padded = torch.nn.functional.pad(pictures, (0, GAP, 0, GAP), value=1.0)
    return torch.cat(list(padded), dim=2)


if __name__ == "__main__":
    main()
