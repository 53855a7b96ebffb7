"""Play a finished calibration: a cache for each run of a pipeline, checked before its first step."""

from typing import Any

from torch import Tensor

from ertacache import checks, solver
from ertacache.attach import Attachment
from ertacache.cache import Cache
from ertacache.calibration import Calibration
from ertacache.published import AdjustedGrid, PublishedCache


class Replay:
    """Check a calibration at the beginning of each run, and make the cache that plays it.

    No step reads a tensor's values.

    Args:
        calibration: one that belongs to the pipeline.
    """

    def __init__(self, calibration: Calibration, pipe: Any):
        self.calibration, self.pipe = calibration, pipe
        self.weights = checks.WeightsWatch(calibration, pipe)

    def begin(self, scheduler: Any) -> Cache:
        """Return the cache of a run on a scheduler whose grid is set; refuse or warn if the run differs."""
        self.weights.check()
        checks.check_grid(self.calibration, *solver.host_grid(scheduler))
        checks.check_guidance(self.calibration, self.pipe)
        return cache_of(self.calibration).begin(scheduler)

    def first_latents(self, latents: Tensor) -> None:
        """Warn or refuse if a run starts from latents of another shape."""
        checks.check_latents(self.calibration, latents.shape[1:])

    def attachment(self, check: str | None = "end", **options: Any) -> Attachment:
        """Return the Attachment to the pipeline, not attached yet; options as `Attachment` takes them."""
        return Attachment(self.pipe, self.begin, first_latents=self.first_latents, check=check, **options)


def cache_of(calibration: Calibration) -> Cache:
    """Return the cache that plays a calibration of either method."""
    if calibration.method == "ertacache":
        return Cache(calibration.computed_steps, calibration.combinations())
    original = calibration.sigmas, calibration.timesteps
    grid = AdjustedGrid(calibration.adjusted_sigmas, calibration.adjusted_timesteps, *original)
    return PublishedCache(calibration.computed_steps, calibration.error_model, grid)
