"""Writes a small copy of the emoji, for a machine that little can be sent to: `python -m tiny_training.pack`.

The copy is a folder like DATA (see sprites.py), of pictures that are small already: all that the transformers learn
from, and for the autoencoders as many others as --others says.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ertacache.files import write_atomically
from tiny_training.emoji import load_subjects
from tiny_training.sprites import Sprites, load_sprites

QUALITY = 60
MOST_FRAMES = 30
TONES = (None, "light", "medium", "dark")  # of those that move; stills keep all


def encoded(frames: np.ndarray) -> bytes:
    """A WebP of uint8 (frames, side, side, 4), moving if there are several."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    moving = {"save_all": True, "append_images": pictures[1:]} if len(pictures) > 1 else {}
    pictures[0].save(buffer, "webp", quality=QUALITY, alpha_quality=60, method=4, **moving)
    return buffer.getvalue()


def chosen(sprites: Sprites, kind: str, others: int) -> list[str]:
    """File names of the subjects that are taught or unseen, and of some others."""
    looks = sprites.looks()
    named = [s.code for name in (kind, "unseen") for s in load_subjects(name) if s.code in looks]
    rest = np.random.default_rng(0).permutation(sorted(set(looks) - set(named)))[:others].tolist()
    stems = []
    for code in named + rest:
        tones = TONES if kind == "clips" else looks[code]
        stems += [looks[code][tone] for tone in tones if tone in looks[code]]
    return stems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stills/ and clips/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the copy")
    parser.add_argument("--others", type=int, default=30, help="subjects beside those with a name")
    args = parser.parse_args()
    for kind in ("stills", "clips"):
        sprites = load_sprites(args.data, kind == "clips")
        (args.out / kind).mkdir(parents=True, exist_ok=True)
        for stem in tqdm(chosen(sprites, kind, args.others), desc=kind):
            path = args.out / kind / f"{stem}.webp"
            if not path.exists():
                write_atomically(path, encoded(sprites[stem][:MOST_FRAMES]))


if __name__ == "__main__":
    main()
