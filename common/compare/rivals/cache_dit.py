"""cache-dit (vipshop) from its own package, if installed: DBCache, with and without its TaylorSeer.

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
    """Compute the first block, and the others if its residual changed by more than the threshold."""

    name = "cache-dit"
    knob = "residual_diff_threshold"
    # (fraction of first steps that are computed, order of TaylorSeer; 0 = plain reuse of the residual)
    VARIANTS = ((0.14, 0), (0.07, 0), (0.14, 1), (0.07, 1), (0.14, 2))

    def settings(self, num_steps: int) -> list[Setting]:
        return self.sweeps(num_steps)[0]

    def sweeps(self, num_steps: int) -> list[list[Setting]]:
        return [
            [
                {"residual_diff_threshold": t, "max_warmup_steps": max(1, round(f * num_steps)), "taylorseer_order": o}
                for t in geometric(20.0, 0.005)
            ]
            for f, o in self.VARIANTS
        ]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        cache_dit = _package()
        order = int(setting["taylorseer_order"])
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=int(setting["max_warmup_steps"]),
            residual_diff_threshold=float(setting["residual_diff_threshold"]),
        )
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
