"""cache-dit (vipshop) from its own package, if installed: DBCache with its TaylorSeer and its masks.

The package changes the transformer's instance and the pipeline's class, and its `disable_cache` leaves its forward
behind, so what it touches is noted before and put back after.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compare.rivals.base import NotApplicable, Rival, Setting, geometric, watch

EXTRA = "cache-dit"


class CacheDit(Rival):
    """Compute the first block, and the others if its residual changed by more than the threshold.

    Or, with one of the package's masks, at steps that are known before the run. One first block, since the embedded
    pipelines have few.
    """

    name = "cache-dit"
    knob = "residual_diff_threshold"
    form = "the package's DBCache with thresholds or masks, with TaylorSeer or without, whichever is best"
    WARM_UPS = (0.14, 0.07)  # fractions of first steps that are computed
    TAYLORSEER = (0, 1, 2)  # orders; 0 is plain reuse of the residual, and the package's DMD is worse than either
    MASKS = ("ultra", "fast", "medium", "slow")  # from few computed steps to many

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        thresholds: list[list[Setting]] = [
            [
                {"residual_diff_threshold": t, "max_warmup_steps": max(1, round(f * num_steps)), "taylorseer_order": o}
                for t in geometric(20.0, 0.005)
            ]
            for f in self.WARM_UPS
            for o in self.TAYLORSEER
        ]
        masks: list[list[Setting]] = [
            [{"mask": mask, "num_steps": num_steps, "taylorseer_order": o} for mask in self.MASKS]
            for o in self.TAYLORSEER
        ]
        return [*thresholds, *masks]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        cache_dit = _package()
        if "mask" in setting:
            mask = cache_dit.steps_mask(total_steps=int(setting["num_steps"]), mask_policy=setting["mask"])
            decided = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
        else:
            decided = {name: setting[name] for name in ("max_warmup_steps", "residual_diff_threshold")}
        config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **decided)
        order = int(setting["taylorseer_order"])
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        with _unchanged(pipe), _unchanged_class(type(pipe)), _quiet():
            try:
                cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            except (AssertionError, ValueError) as error:
                raise NotApplicable(f"cache-dit does not know {type(pipe).__name__}: {error}") from error

            def check_branches() -> None:
                if clock.calls > 1 and not config.enable_separate_cfg:
                    raise NotApplicable(
                        f"cache-dit takes {type(pipe).__name__} for one call a step, and this run has "
                        "two: it would mix up the guidance branches"
                    )

            try:
                with watch(pipe, on_call=check_branches) as clock:
                    yield {}
            finally:
                cache_dit.disable_cache(pipe)


def _package() -> Any:
    try:
        return importlib.import_module("cache_dit")
    except ImportError as error:
        raise NotApplicable(f"cache-dit is not installed (pip install {EXTRA}): {error}") from error


@contextmanager
def _unchanged(pipe: Any) -> Iterator[None]:
    """Restore the instance attributes of the pipeline and of its transformer's modules afterwards.

    Children too, in their order: cache-dit takes the lists of blocks out in every call and puts them back at the end,
    so the single blocks would come first.
    """
    modules = list(pipe.transformer.modules())
    spaces = [vars(owner) for owner in (pipe, *modules)] + [module._modules for module in modules]
    before = [dict(space) for space in spaces]
    try:
        yield
    finally:
        for space, attributes in zip(spaces, before, strict=True):
            space.clear()
            space.update(attributes)


@contextmanager
def _unchanged_class(owner: type) -> Iterator[None]:
    """Restore the attributes of a class afterwards: cache-dit replaces the pipeline's `__call__`."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name in set(vars(owner)) - set(before):
            delattr(owner, name)
        for name, value in before.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the package, which prints several messages per run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
