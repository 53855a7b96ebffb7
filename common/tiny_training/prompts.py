"""Writes a folder's prompts/calibration.txt and held_out.txt: `python -m tiny_training.prompts --data DATA FOLDER`.

Prompts for calibration are captions that were trained on, a subject once while there are others. Held-out ones put a
subject on a background that it was never trained on. No prompt is in both.
"""

import argparse
from pathlib import Path

import numpy as np

from ertacache.files import write_atomically
from tiny_training import emoji, plan
from tiny_training.emoji import EmojiSet
from tiny_training.sources import Source
from tiny_training.sprites import load_sprites


def calibration_prompts(source: Source, count: int) -> list[str]:
    """Full captions of examples, all different; any first few of them are of all kinds of subjects."""
    prompts: dict[str, None] = {}
    rng, start = np.random.default_rng(plan.SEED), 0
    while len(prompts) < count:  # a subject once, in a random order, and then again
        for index in rng.permutation(len(source.names)).tolist():
            prompts[source.captions(start + index)[0]] = None
        start += len(source.names)
    return list(prompts)[:count]


def held_out_prompts(source: Source, count: int) -> list[str]:
    """Prompts that no caption is, all different."""
    prompts = dict.fromkeys(prompt for prompt, _ in source.held_out(4 * count))
    return list(prompts)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder with stills/ and clips/")
    parser.add_argument("--kind", choices=["stills", "clips"], required=True, help="list of subjects")
    parser.add_argument("--calibration", type=int, default=64, help="how many")
    parser.add_argument("--held-out", type=int, default=48, help="how many")
    args = parser.parse_args()
    sprites = load_sprites(args.data, args.kind == "clips")
    frames = plan.NUM_FRAMES if args.kind == "clips" else 1
    source = EmojiSet(
        args.kind, sprites, emoji.load_subjects(args.kind), plan.SEED + plan.TAUGHT, plan.SIZE, num_frames=frames
    )
    files = {
        "calibration": calibration_prompts(source, args.calibration),
        "held_out": held_out_prompts(source, args.held_out),
    }
    for name, prompts in files.items():
        write_atomically(args.folder / "prompts" / f"{name}.txt", "\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
