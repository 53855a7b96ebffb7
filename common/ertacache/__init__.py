"""ERTACache: reuse the outputs of a diffusion transformer on steps where that costs nothing visible.

    calibration = ertacache.calibrate(pipe, prompts, seeds=range(8), speedup=2.0, num_inference_steps=28)
    calibration.save("flux-dev-28-2x.json")
    with ertacache.apply(pipe, calibration):      # attaches at once; leaving the block removes it
        image = pipe(prompt, num_inference_steps=28).images[0]

`calibrate` makes a `Calibration` for a pipeline, which is one JSON file; `apply` attaches it, to any diffusers pipeline
that has a transformer and a scheduler or to a transformer alone, and `remove` takes it off. What would give a wrong
result raises one of the errors below; what costs quality only is a `MismatchWarning`. Distances to the uncached
result are in `ertacache.metrics`; the command `ertacache` looks into calibration files.

The method follows arXiv 2508.21091 and goes beyond it; see docs/method.md, and docs/calibration-file.md for the file.
"""

from ertacache.api import Applied, apply, remove
from ertacache.calibrate import calibrate
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError, ERTACacheError, MismatchError, MismatchWarning, NumericsError, StateError

__all__ = [
    "Applied",
    "Calibration",
    "CalibrationError",
    "ERTACacheError",
    "MismatchError",
    "MismatchWarning",
    "NumericsError",
    "StateError",
    "apply",
    "calibrate",
    "remove",
]
__version__ = "0.1.0"
