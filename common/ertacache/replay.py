"""Play a finished calibration: a cache for each run of a pipeline, checked before its first step."""

from typing import Any

from torch import Tensor

from ertacache import checks, provenance, solver
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
        call = self.attached.caller
        checks.check_no_other_cache(self.pipe)
        self.weights.check()
        self.offset = checks.check_grid(self.calibration, *solver.host_grid(scheduler))
        checks.check_arguments(self.calibration, call.pipe, provenance.arguments_of(*call))
        return cache_of(self.calibration).begin(scheduler)

    def started(self, latents: Tensor, first: int, stream: int) -> None:
        """Refuse a run from another step of the grid; warn or refuse if it starts from latents of another shape."""
        checks.check_first(self.calibration, first, self.offset)
        if stream == 0:
            checks.check_latents(self.calibration, latents.shape[1:])

    def guided(self, step: int, branches: float) -> None:
        """Refuse another kind of guidance."""
        checks.check_branches(self.calibration, step, branches)

    def attachment(self, check: str | None = "end", **options: Any) -> Attachment:
        """Return the Attachment to the pipeline, not attached yet; options as `Attachment` takes them."""
        options = {"started": self.started, "guided": self.guided, "check": check, **options}
        self.attached = Attachment(self.pipe, self.begin, **options)
        return self.attached


def cache_of(calibration: Calibration) -> Cache:
    """Return the cache that plays a calibration of either method."""
    if calibration.method == "ertacache":
        return Cache(calibration.computed_steps, calibration.combinations())
    original = calibration.sigmas, calibration.timesteps
    grid = AdjustedGrid(calibration.adjusted_sigmas, calibration.adjusted_timesteps, *original)
    return PublishedCache(calibration.computed_steps, calibration.error_model, grid)
