"""Training-free step caching for diffusion transformers.

    ertacache.enable(pipe, speedup=2)
    image = pipe(prompt).images[0]                # four results are watched; the next ones are twice as fast

`enable` calibrates while the pipeline is used, and remembers it for the next process. To choose the prompts:

    calibration = ertacache.calibrate(pipe, prompts, seeds=range(8), speedup=2.0, num_inference_steps=28)
    calibration.save("flux-dev-28-2x.json")
    with ertacache.apply(pipe, calibration):      # attaches at once; leaving the block removes it
        image = pipe(prompt, num_inference_steps=28).images[0]

`calibrate` makes a `Calibration`, one JSON file, or a `Bundle` of several. `apply` attaches it to a diffusers pipeline
with a transformer and a scheduler, or to a bare transformer; `remove` takes it off. What would give a wrong result
raises one of the errors below; what only costs quality is a `MismatchWarning`, and what `enable` cannot do an
`EnableWarning`. `ertacache.metrics` measures the distance to uncached results. `explain` says what ERTACache would do
with a pipeline. The command `ertacache` inspects calibration files and pipelines, and looks after stored calibrations.

The method is derived from arXiv 2508.21091; see docs/method.md, and docs/calibration-file.md for the file.
"""

from typing import TYPE_CHECKING, Any

from ertacache._version import __version__
from ertacache.api import Applied, apply, remove
from ertacache.calibration import Bundle, Calibration
from ertacache.errors import (
    CalibrationError,
    EnableWarning,
    ERTACacheError,
    MismatchError,
    MismatchWarning,
    NumericsError,
    StateError,
)

if TYPE_CHECKING:
    from ertacache.auto.handle import enable
    from ertacache.fit.explain import explain
    from ertacache.fit.recipe import calibrate

__all__ = [
    "Applied",
    "Bundle",
    "Calibration",
    "CalibrationError",
    "ERTACacheError",
    "EnableWarning",
    "MismatchError",
    "MismatchWarning",
    "NumericsError",
    "StateError",
    "__version__",
    "apply",
    "calibrate",
    "enable",
    "explain",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # fitting is loaded where it is asked for
        from ertacache.fit.recipe import calibrate

        return calibrate
    if name == "enable":
        from ertacache.auto.handle import enable

        return enable
    if name == "explain":
        from ertacache.fit.explain import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
