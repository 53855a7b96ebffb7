"""Play a finished calibration: a cache for each run of a pipeline, checked before its first step."""

import threading
from contextlib import suppress
from typing import Any

from torch import Tensor

from ertacache import checks, provenance, solver
from ertacache.attach import Attachment
from ertacache.cache import Cache, Call, Coefficients
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
        self.local = threading.local()  # a run belongs to its thread

    def begin(self, scheduler: Any) -> Cache:
        """Return the cache of a run on a scheduler whose grid is set; refuse or warn if the run differs."""
        call = self.attached.caller
        checks.check_no_other_cache(self.pipe)
        self.weights.check()
        self.local.offset = checks.check_grid(self.calibration, *solver.host_grid(scheduler))
        checks.check_arguments(self.calibration, call.pipe, provenance.arguments_of(*call))
        return cache_of(self.calibration).begin(scheduler)

    def started(self, latents: Tensor, first: int, stream: int) -> None:
        """Refuse a run from another step of the grid; warn or refuse if it starts from latents of another shape."""
        checks.check_first(self.calibration, first, self.local.offset)
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


class Chosen(Cache):
    """Play what is chosen at the first step, when more is known of a run; that step is computed whatever it is.

    Attributes:
        facts: what was read before the run began.
        fills: whether networks were given objects that they may fill at the first step for later ones.
    """

    def __init__(self, facts: Any = None):
        super().__init__((), Coefficients.of_outputs([]))
        self.facts, self.fills = facts, False
        self.chosen: Cache | None = None

    def begin(self, scheduler: Any) -> Cache:
        return self

    def computes(self, step: int) -> bool:
        return self.chosen is None or self.chosen.computes(step)

    def stream(self, index: int) -> Cache:
        return self.chosen.stream(index) if index and self.chosen is not None else self

    def output(self, step: int, call: Call, scheduler: Any = None) -> Tensor:
        assert self.chosen is not None
        return self.chosen.output(step, call, scheduler)

    def end(self) -> None:
        if self.chosen is not None:
            self.chosen.end()


class BundleReplay(Replay):
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
        checks.check_pipeline(self.replays[0].calibration, pipe)
        self.local = threading.local()  # a run belongs to its thread

    def begin(self, scheduler: Any) -> Cache:
        """Return the cache of a run on a scheduler whose grid is set; refuse if no calibration is for it."""
        grid = solver.host_grid(scheduler)
        fitting: dict[int, list[Replay]] = {}  # by the step of the grid that they are from
        for replay in self.replays:
            with suppress(MismatchError):
                fitting.setdefault(checks.check_grid(replay.calibration, *grid), []).append(replay)
        if not fitting:
            steps = ", ".join(sorted({str(r.calibration.num_inference_steps) for r in self.replays}))
            raise MismatchError(f"the bundle is for {steps} steps, and none for this grid of {len(grid[0])} steps")
        if len(fitting) == 1:
            [found] = fitting.values()
            return self._best(found).begin(scheduler)
        self.local.cache = Chosen((scheduler, fitting))  # by the step that it starts from
        return self.local.cache

    def _best(self, replays: list[Replay]) -> Replay:
        caller = self.attached.caller
        given = provenance.arguments_of(*caller).get("guidance_scale", [getattr(caller.pipe, "guidance_scale", None)])

        def distance(replay: Replay) -> tuple[bool, float]:
            c = replay.calibration
            return c.guidance_scale != given[0], abs(c.speedup - self.speedup) if self.speedup else c.speedup

        self.local.replay, self.local.cache = min(replays, key=distance), None
        self.local.replay.attached = self.attached
        return self.local.replay

    def started(self, latents: Tensor, first: int, stream: int) -> None:
        """Choose by the run's first step where several could be meant; then as one calibration does."""
        cache = self.local.cache
        if cache is not None:
            scheduler, fitting = cache.facts
            replays = fitting.get(first) or next(iter(fitting.values()))  # which refuses
            cache.chosen = self._best(replays).begin(scheduler)
        self.local.replay.started(latents, first, stream)

    def guided(self, step: int, branches: float) -> None:
        self.local.replay.guided(step, branches)


def cache_of(calibration: Calibration, own_grid: bool = False) -> Cache:
    """Return the cache that plays a calibration of either method.

    Args:
        own_grid: leave the scheduler on its own grid, without the published method's adjustment.
    """
    if calibration.method == "ertacache":
        return Cache(calibration.computed_steps, calibration.combinations())
    original = calibration.sigmas, calibration.timesteps
    adjusted = AdjustedGrid(calibration.adjusted_sigmas, calibration.adjusted_timesteps, *original)
    grid = None if own_grid else adjusted
    return PublishedCache(calibration.computed_steps, calibration.error_model, grid)
