"""Makes a calibration: profile the uncached runs, choose the steps, fit on policy, predict the quality."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import torch

from ertacache import policy, provenance, solver
from ertacache.announcement import Announcement
from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.maker import Maker, bare_calibration
from ertacache.runs import MICRO_BATCH, Runs, make_runs, quiet
from ertacache.schema import CALIBRATED_METHODS
from ertacache.timesteps import PHI_OVER


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    speedup: float | None = None,
    computed_steps: int | None = None,
    min_psnr: float | None = None,
    threshold: float | None = None,
    method: str = "ertacache",
    phi_over: str = PHI_OVER[0],
    search_budget: int = 0,
    refine: int = 0,
    descent: int = 0,
    folds: int = 2,
    micro_batch: int = MICRO_BATCH,
    memory_limit: int | None = None,
    progress: bool = True,
    model_id: str | None = None,
    **pipe_kwargs: Any,
) -> Calibration:
    """Calibrate a pipeline for the schedule that was asked for.

    Exactly one of `speedup` (K = floor(N / speedup)), `computed_steps` (K), `min_psnr` (the smallest K whose
    predicted PSNR to the uncached result reaches it, in dB) and `threshold` (the paper's lambda) is given.

    Args:
        pipe: a diffusers pipeline with a transformer and a scheduler.
        prompts: calibration prompts. Run i takes prompt i and seed i, the shorter list repeated.
        seeds: of the noise of the runs, drawn on the CPU; one for all prompts by default.
        method: "ertacache", or "paper" for the published one, which alone takes `threshold`.
        phi_over: of method "paper": what its timestep adjustment measures an error by, "output" or "change".
        search_budget: how many schedules may be tried for real, 0 for none; 3 are a good beginning. Each costs K steps
            of all prompts. With any, the growth of errors is measured (about 12 N steps) and what a step may combine is
            cross-validated, with `refine` for refined coefficients too.
        refine: prompts, the first ones, for which the coefficients are fitted a second time, end to end; each costs
            about 2 K^2 steps, or twice that. 0 leaves it out.
        descent: steps of gradient descent, after refinement, on matrices of channels; 80 do. Each takes the time of
            about 4 K steps of up to 16 prompts, and the transformer has to let gradients through. There must be 8
            prompts or more, the last quarter of which is fitted to by nothing then. 0 leaves it out.
        folds: cross-validation folds of the quality prediction; 0 leaves it out. With `descent` the prompts that are
            left out of the fit tell it, for any number of folds of 2 or more.
        micro_batch: how many samples the transformer sees at a time, which bounds its peak memory.
        memory_limit: bytes of recorded trajectories that may stay in host memory; above it they go to files in the
            system's temporary folder, which are removed afterwards. None for no limit.
        progress: show a bar, and say before it what the calibration costs.
        model_id: name to keep in the file; the transformer's own by default.
        pipe_kwargs: everything else goes to the pipeline (num_inference_steps, height, width, ...).

    Returns:
        The calibration, not saved yet. It computes all steps where fewer do not reach `min_psnr`; the published
        method may compute fewer than asked for, where its threshold reaches no such number.

    Raises:
        CalibrationError: the request is not one of the above, or cannot be met; with `descent` also where there are
            too few prompts, latents whose channels cannot be told, or a transformer that lets no gradients through.
        NumericsError: an output of the transformer holds NaN or Inf; it is looked at in every step.
        StateError: the pipeline's calls do not form runs that can be followed.
    """
    goal = _checked_goal(method, speedup, computed_steps, min_psnr, threshold)
    if phi_over not in PHI_OVER:
        raise CalibrationError(f"phi_over is {phi_over!r}: it must be one of {', '.join(PHI_OVER)}")
    runs = make_runs(pipe, prompts, seeds, pipe_kwargs, micro_batch, progress, memory_limit)
    descent = descent if method == "ertacache" else 0
    maker = Maker(runs, method, threshold, search_budget, refine, folds, descent, phi_over=phi_over)
    Announcement(maker.work(), goal, runs.bar).follow(runs.recorded)
    # what is made in inference mode has no gradients later either
    inference = torch.is_inference_mode_enabled() and not descent
    with quiet(pipe), torch.inference_mode(inference), torch.no_grad():
        runs.record()
        num_steps = runs.recorded.num_steps
        if speedup is not None:
            computed_steps = policy.computed_steps_for(num_steps, speedup)
        made = maker.smallest(min_psnr) if min_psnr is not None else maker.make(computed_steps)
    runs.bar.close()
    effort: dict[str, Any] = {"search_budget": search_budget, "refine": refine, "descent": descent}
    effort = effort if method == "ertacache" else {"phi_over": phi_over}
    return replace(made, **_provenance(runs, model_id, effort))


def plain_calibration(runs: Runs, **fitted: Any) -> Calibration:
    """A calibration of given parts for the recorded runs, without a predicted quality."""
    return replace(bare_calibration(runs.recorded, **fitted), **_provenance(runs, None, {}))


def _checked_goal(method: str, speedup: Any, computed_steps: Any, min_psnr: Any, threshold: Any) -> tuple[str, Any]:
    """The one goal that is given, with its value; raises CalibrationError for none or more."""
    if method not in CALIBRATED_METHODS:
        raise CalibrationError(f"method is {method!r}: it must be one of {', '.join(CALIBRATED_METHODS)}")
    given = {"speedup": speedup, "computed_steps": computed_steps, "min_psnr": min_psnr, "threshold": threshold}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise CalibrationError(f"give exactly one of {', '.join(given)}; got {', '.join(named) or 'none'}")
    if threshold is not None and method != "paper":
        raise CalibrationError(
            "threshold belongs to method='paper'; ask ertacache for speedup, computed_steps or min_psnr"
        )
    return named[0], given[named[0]]


def _provenance(runs: Runs, model_id: str | None, effort: dict[str, Any]) -> dict[str, Any]:
    pipe = runs.pipe
    plain = {k: v for k, v in {**runs.kwargs, **effort}.items() if isinstance(v, (int, float, str, bool))}
    return {
        "scheduler": solver.identity(pipe.scheduler),
        "model": provenance.model_identity(pipe.transformer, model_id),
        "dtype": provenance.model_dtype(pipe.transformer),
        # as asked: where guidance is dynamic, the pipeline's own is the last step's by now
        "guidance_scale": runs.kwargs.get("guidance_scale", getattr(pipe, "guidance_scale", None)),
        "prompts": {"sha256": provenance.prompts_hash(runs.prompts, runs.seeds), "count": len(runs)},
        "settings": dict(sorted(plain.items())),
        "versions": provenance.package_versions(),
        "date": date.today().isoformat(),
    }
