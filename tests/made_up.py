"""Made-up rows, curves and pictures for the tests of tables and reports. None of these numbers was measured."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compare.results import Curve, Row, is_comparable

NUM_STEPS = 28
RIVALS = {
    "magcache": 11.0,
    "first_block_cache": 15.5,
    "taylorseer": 18.0,
    "teacache": 17.0,
    "easycache": 14.0,
    "seacache": 16.0,
    "pyramid_attention_broadcast": 20.0,
    "fastercache": 19.0,
    "cache_dit": 15.0,
    "paper": 13.0,
    "fewer_steps": 20.5,
    "multistep": 20.0,
}


def schedule(count: int) -> list[int]:
    """`count` of the 28 steps, denser at the beginning, step 0 among them."""
    return sorted({round((NUM_STEPS - 1) * (i / (count - 0.5)) ** 1.25) for i in range(count)})


def row(method: str = "ertacache", role: str = "ours", asked: int | None = 14, **changes: Any) -> Row:
    """A valid row; `changes` replace fields."""
    cost = (asked or NUM_STEPS) / NUM_STEPS
    values: dict[str, Any] = {
        "model": "tiny FLUX",
        "method": method,
        "role": role,
        "setting": "guidance 4",
        "num_inference_steps": NUM_STEPS,
        "computed_steps": schedule(asked) if asked else None,
        "compute_fraction": cost,
        "denoise_seconds": 1.2 * cost,
        "speedup": 0.97 / cost,
        "psnr": 62.0,
        "psnr_p10": 58.0,
        "ssim": 0.9991,
        "ssim_p10": 0.9972,
        "lpips": 0.0021,
        "lpips_p10": 0.0054,
        "n": 48,
        "prompts_sha256": "0" * 64,
        "seeds": [0, 1],
        "device": "CPU (2 cores)",
        "dtype": "float32",
        "versions": {"torch": "0.0", "diffusers": "0.0"},
        "asked_steps": asked,
        "knob": {"computed_steps": asked} if asked else None,
        "comparable": role == "rival",
    }
    return Row(**(values | changes))


def rows() -> list[Row]:
    """A reference, ours and twelve rivals at three costs."""
    found = [row("none", "reference", None, psnr=120.0, psnr_p10=120.0, ssim=1.0, lpips=0.0, speedup=1.0)]
    for asked in (14, 11, 9):
        loss = 0.9 * (14 - asked)
        found.append(row(asked=asked, psnr=62 - 1.4 * loss, psnr_p10=58 - 1.4 * loss))
        for index, (method, gap) in enumerate(RIVALS.items()):
            cost = asked / NUM_STEPS + (0.012 * (index % 4) if index != 6 else 0.3)
            psnr = 62 - gap - 2.1 * loss
            found.append(
                row(
                    method,
                    "rival",
                    asked,
                    compute_fraction=cost,
                    speedup=(0.9 - 0.01 * index) / cost,
                    psnr=psnr,
                    psnr_p10=psnr - 5,
                    ssim=1 - 10 ** (-psnr / 22),
                    ssim_p10=0.9,
                    lpips=10 ** (-psnr / 30) * 2,
                    lpips_p10=0.2,
                    comparable=is_comparable(cost, asked / NUM_STEPS),
                    knob={"threshold": 0.031 * (index + 1)},
                    computed_steps=None if index % 3 else schedule(asked),
                    denoise_seconds=1.2 * cost,
                )
            )
    return found


def curves() -> dict[str, list[Curve]]:
    """Errors that grow at reused steps, at three costs; the first step of each has none."""
    found: dict[str, list[Curve]] = {}
    for index, method in enumerate(("ertacache", "magcache", "first_block_cache", "taylorseer", "teacache")):
        for asked in (14, 11, 9):
            computed, error, errors = schedule(asked), 0.0, []
            for step in range(NUM_STEPS):
                error = error * 0.97 + (0.002 * (1 + 9 * index) * math.exp(-step / 20) if step not in computed else 0.0)
                errors.append(error)
            known = computed if index % 2 == 0 else None
            found.setdefault(method, []).append(Curve(errors, known, asked))
    return found


def picture(seed: int, noise: float = 0.0, frames: int | None = None, size: int = 64) -> NDArray[np.uint8]:
    """Two soft discs on a gradient, (H, W, 3) or (F, H, W, 3) with the discs moving; `noise` spoils it."""
    rng = np.random.default_rng(seed)
    colours, centres, radius = rng.random((3, 3)), rng.uniform(0.25, 0.75, (2, 2)), rng.uniform(0.12, 0.25, 2)
    y, x = np.mgrid[0:size, 0:size] / size
    made = []
    for frame in range(frames or 1):
        image = colours[0] * (0.4 + 0.6 * y[..., None])
        for index in range(2):
            cx = centres[index, 0] + 0.02 * frame * (-1) ** index
            inside = 1 / (1 + np.exp((np.hypot(x - cx, y - centres[index, 1]) - radius[index]) * 60))
            image = image + inside[..., None] * (colours[index + 1] - image)
        image = image + np.random.default_rng(seed + 1).normal(0, noise, image.shape)
        made.append((image.clip(0, 1) * 255).round().astype(np.uint8))
    return made[0] if frames is None else np.stack(made)


def examples(frames: int | None = None) -> list[dict[str, Any]]:
    """Two prompts with every method at three costs."""
    found = []
    for seed, prompt in enumerate(("a red disc beside a green one", 'two discs </script><b>& a "fish" 🐟')):
        found.append(
            {
                "prompt": prompt,
                "seed": seed,
                "method": "none",
                "computed_steps": None,
                "image": picture(seed, frames=frames),
            }
        )
        for asked in (14, 11, 9):
            for index, method in enumerate(("ertacache", *RIVALS)):
                image = picture(seed, 0.004 + 0.02 * index * (20 - asked) / 10, frames)
                found.append(
                    {"prompt": prompt, "seed": seed, "method": method, "computed_steps": asked, "image": image}
                )
    return found
