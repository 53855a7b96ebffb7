"""Write what a comparison leaves: results.json, table.md and report.html."""

from datetime import date
from typing import TYPE_CHECKING, Any

import torch

from compare import processes
from compare.comparison import Comparison, Contender
from compare.report import write_report
from compare.results import Curve, Row, write_results
from compare.table import table_markdown
from ertacache import provenance
from ertacache.calibration import Calibration
from ertacache.files import write_atomically
from ertacache.metrics import worst_decile

if TYPE_CHECKING:
    from compare.study import Study


def row_of(study: "Study", contender: Contender, comparison: Comparison, times: dict[str, float]) -> Row:
    """Make a row of results.json for one contender; `times` holds seconds by contender name."""
    measured = comparison.quality(contender)
    seconds, uncached = times[contender.name], times["none uncached"]
    values: dict[str, Any] = {}
    for name, higher in (("psnr", True), ("ssim", True), ("lpips", False)):
        items = measured[name]
        values[name] = sum(items) / len(items) if items else None
        values[name + "_p10"] = float(worst_decile(items, higher)) if items else None
    temporal = measured.get("temporal_error")
    return Row(
        model=f"{study.model.name} {study.chosen.model}",
        method=contender.method,
        role=contender.role,
        setting=contender.setting,
        num_inference_steps=study.chosen.num_inference_steps,
        computed_steps=contender.computed_steps,
        compute_fraction=comparison.fraction(contender) if contender.role != "reference" else 1.0,
        denoise_seconds=seconds,
        speedup=uncached / seconds,
        **values,
        n=len(comparison.pairs),
        prompts_sha256=provenance.prompts_hash(study.prompts),
        seeds=list(study.chosen.seeds),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        dtype=study.chosen.dtype,
        versions=provenance.package_versions(),
        temporal_error=sum(temporal) / len(temporal) if temporal else None,
        asked_steps=contender.asked_steps,
        knob=contender.knob,
        comparable=contender.comparable,
        form=contender.form,
        calibration_runs=contender.calibration_runs,
        reasons={} if study.perceptual else {"lpips": study.no_lpips},
    )


def write_outcome(
    study: "Study", rows: list[Row], contenders: list[Contender], reference: Contender, comparison: Comparison
) -> None:
    """Write results.json, table.md and report.html into the study's folder, in the main process."""
    curves = _curves(contenders, comparison)
    if not processes.is_main():
        return
    meta = {
        "title": f"ERTACache and its rivals on {rows[0].model}",
        "command": study.chosen.command,
        "date": date.today().isoformat(),
        "prompts": f"{len(study.prompts)} held-out prompts, seeds {', '.join(map(str, study.chosen.seeds))}",
        "calibration": f"{len(study.calibration_prompts)} other prompts, effort {study.chosen.effort}",
        "predicted": _predictions(study, rows),
        "settings": {k: v for k, v in study.arguments.items() if isinstance(v, (int, float, str))}
        | ({"variant": study.model.variant(study.chosen)} if study.model.variant else {}),
        "not applicable": study.not_applicable,
    }
    write_results(study.out / "results.json", rows, meta)
    write_atomically(study.out / "table.md", table_markdown(rows, command=meta["command"]))
    examples = [example for c in [reference, *contenders] for example in _examples(c, comparison)]
    write_report(study.out / "report.html", rows, examples, curves, meta)
    print(f"results.json, table.md and report.html are in {study.out}")


def _ours(study: "Study", rows: list[Row]) -> dict[str, Calibration]:
    """Our calibrations that were compared, by method and asked number of computed steps."""
    asked = [(row.method, row.asked_steps) for row in rows if row.role == "ours" and row.asked_steps is not None]
    return {f"{method} {count}": study.calibration(method, count) for method, count in asked}


def _predictions(study: "Study", rows: list[Row]) -> dict[str, float]:
    """Predicted PSNR of ours in dB, by method and asked number of computed steps."""
    made = _ours(study, rows).items()
    return {name: calibration.predicted["psnr"] for name, calibration in made if calibration.predicted}


def _curves(contenders: list[Contender], comparison: Comparison) -> dict[str, list[Curve]]:
    """Method -> error per step at each cost, if its steps are the reference's."""
    curves: dict[str, list[Curve]] = {}
    for contender in contenders:
        error = comparison.error_per_step(contender)
        if error is not None:
            curves.setdefault(contender.method, []).append(
                Curve(error, contender.computed_steps, contender.asked_steps)
            )
    return curves


def _examples(contender: Contender, comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "seed": seed,
            "method": contender.method,
            "computed_steps": contender.asked_steps,
            "image": image,
        }
        for (prompt, seed), image in zip(comparison.pairs, comparison.examples(contender), strict=False)
    ]
