"""Rivals: every cache that ERTACache is compared with, one class each (`base.Rival`).

    rivals = all_rivals(modulated_input)
    tuner = Tuner(pipe, runs, num_steps=28)
    tuned = tuner.tune(rivals[0], wanted_fraction=0.5)
    with rivals[0].attach(pipe, tuned.setting) as overrides:
        pipe(prompt, **{"num_inference_steps": 28, **overrides})

A rival that does not work on a pipeline raises `NotApplicable`, at the latest in its first run. Caches decide for a
whole batch at once, so compare them with one prompt per call.
"""

from compare.rivals.base import NotApplicable, Rival, Run, Setting
from compare.rivals.budcache import BudCache
from compare.rivals.cache_dit import CacheDit
from compare.rivals.diffusers_caches import FirstBlockCache, MagCache, SeaCache
from compare.rivals.diffusers_modules import FasterCache, PyramidAttentionBroadcast, TaylorSeer
from compare.rivals.easycache import EasyCache
from compare.rivals.fewer_steps import FewerSteps
from compare.rivals.learned import LearnedSolver
from compare.rivals.meancache import MeanCache
from compare.rivals.multistep import Multistep
from compare.rivals.oss import OptimisedSteps
from compare.rivals.runs import PromptRun
from compare.rivals.teacache import ModulatedInput, TeaCache
from compare.rivals.tuning import Tuned, Tuner

__all__ = [
    "BudCache",
    "CacheDit",
    "EasyCache",
    "FasterCache",
    "FewerSteps",
    "FirstBlockCache",
    "LearnedSolver",
    "MagCache",
    "MeanCache",
    "ModulatedInput",
    "Multistep",
    "NotApplicable",
    "OptimisedSteps",
    "PromptRun",
    "PyramidAttentionBroadcast",
    "Rival",
    "Run",
    "SeaCache",
    "Setting",
    "TaylorSeer",
    "TeaCache",
    "Tuned",
    "Tuner",
    "all_rivals",
]


def all_rivals(modulated_input: ModulatedInput | None = None) -> list[Rival]:
    """Make one rival of each kind; `modulated_input` is the model's signal for TeaCache."""
    return [
        FewerSteps(),
        Multistep(),
        TeaCache(modulated_input),
        EasyCache(),
        MagCache(),
        FirstBlockCache(),
        TaylorSeer(lite=True),
        TaylorSeer(lite=False),
        SeaCache(),
        PyramidAttentionBroadcast(),
        FasterCache(),
        CacheDit(),
        MeanCache(),
        BudCache(),
        OptimisedSteps(),
        LearnedSolver(),
        LearnedSolver(unlimited=True),
    ]
