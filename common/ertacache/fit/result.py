"""Calibrations made of what was fitted, and where they come from."""

from dataclasses import replace
from datetime import date
from typing import Any

from ertacache import provenance, solver
from ertacache.cache import Coefficients
from ertacache.calibration import Calibration, calibration_fields
from ertacache.checks import PER_PROMPT
from ertacache.fit.record import Record
from ertacache.fit.runs import Runs


def bare_calibration(record: Record, method: str, **fitted: Any) -> Calibration:
    """A calibration of recorded runs that does not say yet where it comes from."""
    return Calibration(
        method=method,
        num_inference_steps=record.num_steps,
        timesteps=record.timesteps,
        sigmas=record.sigmas,
        scheduler={},
        model={},
        latent_shape=list(record.latents[0].shape[1:]),
        dtype="",
        **fitted,
    )


def calibration_of(
    record: Record, schedule: list[int], coefficients: Coefficients, predicted: dict[str, Any] | None
) -> Calibration:
    fields = calibration_fields(coefficients)
    for stream, recorded in zip(fields["streams"] or (), record.streams, strict=False):
        stream["latent_shape"] = list(recorded.latents[0].shape[1:])
    return bare_calibration(record, "ertacache", computed_steps=schedule, predicted=predicted, **fields)


def plain_reuse(record: Record, schedule: list[int]) -> Calibration:
    """A calibration that takes the newest output as it is."""
    rows = [[1.0]] * record.num_steps
    streams = tuple(Coefficients.of_outputs(rows) for _ in record.streams)
    plain = replace(Coefficients.of_outputs(rows), streams=streams)
    return calibration_of(record, schedule, plain, None)


def provenance_of(runs: Runs, model_id: str | None, effort: dict[str, Any]) -> dict[str, Any]:
    pipe = runs.pipe
    given = {name: provenance.as_plain(name, value) for name, value in {**runs.kwargs, **effort}.items()}
    plain = {name: value for name, value in given.items() if isinstance(value, provenance.PLAIN)}
    plain |= dict.fromkeys(runs.per_prompt, PER_PROMPT)
    identity = provenance.pipeline_identity(pipe)
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
        "pipeline": {**identity, "branches": list(runs.record.branches), "every_step": runs.every_step},
    }
