"""What the loops of all official packages are held to. Holds no test."""

from typing import Any

import torch

import ertacache

PROMPTS = ["a ring", "two discs", "a square", "a star"]


def check_loop(name: str, model: Any, loop: Any, sample: Any) -> tuple[Any, torch.Tensor]:
    """Calibrate a loop where it is, and run it on the model alone and through its adapter.

    Returns the calibration for 10 of 20 steps, and the latents that the model alone makes with it.
    """
    reference = sample(model, "a cube", 9)
    goal = {"seeds": range(4), "progress": False}
    with ertacache.apply(model, ertacache.calibrate(loop, PROMPTS, computed_steps=20, **goal)):
        assert torch.equal(sample(model, "a cube", 9), reference)
    made = ertacache.calibrate(loop, PROMPTS, computed_steps=10, **goal)
    with ertacache.apply(model, made) as applied:
        alone = sample(model, "a cube", 9)
    assert (applied.computed_calls, applied.reused_calls) == (10, 10)
    with ertacache.apply(loop, made):
        through = loop("a cube", torch.Generator().manual_seed(9), output_type="latent")[0]
    plain = ertacache.Calibration(**{**vars(made), "coefficients": [[1.0]] * 20})
    with ertacache.apply(model, plain):
        naive = sample(model, "a cube", 9)
    error, worse = (float((x - reference).norm() / reference.norm()) for x in (alone, naive))
    apart = float((alone - through).abs().max())
    print(f"{name}: error {error:.3f} of the latents, plain reuse {worse:.3f}; model alone to adapter {apart:.1e}")
    assert torch.allclose(alone, through, atol=1e-4) and error < 0.8 * worse
    return made, alone
