"""Play a finished calibration: a cache for each run of a pipeline, checked before its first step."""

from contextlib import suppress
from typing import Any

from torch import Tensor

from ertacache import checks, solver
from ertacache.attach import Attachment
from ertacache.cache import Cache
from ertacache.calibration import Bundle, Calibration
from ertacache.errors import CalibrationError, MismatchError
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


class BundleReplay:
    """Play that calibration of a bundle which is for the run's grid.

    Args:
        speedup: N / K that is wanted where several are for it; the nearest is taken. None: the most computed steps.
    """

    def __init__(self, bundle: Bundle, pipe: Any, speedup: float | None = None):
        self.pipe, self.speedup = pipe, speedup
        self.replays: list[Replay] = []
        refused: list[MismatchError] = []
        for calibration in bundle:
            try:
                checks.check_model(calibration, pipe.transformer)
                checks.check_scheduler(calibration, pipe.scheduler)
            except MismatchError as error:
                refused.append(error)
            else:
                self.replays.append(Replay(calibration, pipe))
        if not self.replays:
            raise refused[0] if refused else CalibrationError("the bundle holds no calibration")
        checks.check_weights(self.replays[0].calibration, pipe.transformer)
        self.chosen = self.replays[0]

    def begin(self, scheduler: Any) -> Cache:
        """Return the cache of a run on a scheduler whose grid is set; refuse if no calibration is for it."""
        grid, fitting = solver.host_grid(scheduler), []
        for replay in self.replays:
            with suppress(MismatchError):
                checks.check_grid(replay.calibration, *grid)
                fitting.append(replay)
        if not fitting:
            steps = ", ".join(sorted({str(r.calibration.num_inference_steps) for r in self.replays}))
            raise MismatchError(
                f"no calibration of the bundle is for this grid of {len(grid[0])} steps; it has {steps}"
            )
        self.chosen = min(fitting, key=self._distance)
        return self.chosen.begin(scheduler)

    def _distance(self, replay: Replay) -> tuple[bool, float]:
        c, scale = replay.calibration, getattr(self.pipe, "guidance_scale", None)
        return c.guidance_scale != scale, abs(c.speedup - self.speedup) if self.speedup else c.speedup

    def first_latents(self, latents: Tensor) -> None:
        """Warn or refuse if a run starts from latents of another shape."""
        self.chosen.first_latents(latents)

    def attachment(self, check: str | None = "end") -> Attachment:
        """Return the Attachment to the pipeline, not attached yet."""
        return Attachment(self.pipe, self.begin, first_latents=self.first_latents, check=check)


def cache_of(calibration: Calibration) -> Cache:
    """Return the cache that plays a calibration of either method."""
    if calibration.method == "ertacache":
        return Cache(calibration.computed_steps, calibration.combinations())
    original = calibration.sigmas, calibration.timesteps
    grid = AdjustedGrid(calibration.adjusted_sigmas, calibration.adjusted_timesteps, *original)
    return PublishedCache(calibration.computed_steps, calibration.error_model, grid)
