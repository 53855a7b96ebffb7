"""What a LoRA or int8 weights cost with the base model's calibration: `python bench/changed_weights.py`.

    python bench/changed_weights.py --page    only put the table into docs/compatibility.md (part of make figures)

On the embedded FLUX pipeline: PSNR to the uncached result of the same changed weights, with the calibration of the
base model and with one made for the changed weights. Needs peft and torchao. Writes bench/results/changed_weights.json.
"""

import argparse
import copy
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from quality import HeldOut
from record import RESULTS, ROOT, machine, write

import ertacache
from compare.pages import fill, grid
from ertacache.calibration import Calibration
from ertacache.cli.settings import read_prompts

FOLDER = ROOT / "ERTACache4FLUX"
RESULT = RESULTS / "changed_weights.json"
PAGE = ROOT / "docs" / "compatibility.md"
MARKER = "weights"
ARGUMENTS = {"height": 64, "width": 64, "num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 40}
STEPS = 14
NEEDED = ("peft", "torchao")


def quality(pipe: Any, calibrations: Sequence[Calibration], count: int) -> list[float]:
    """Mean PSNR in dB with each calibration on held-out prompts, to the uncached result of the same weights."""
    held_out = HeldOut(pipe, FOLDER, ARGUMENTS, count, first_seed=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ertacache.MismatchWarning)
        return [held_out.of(calibration)["psnr"] for calibration in calibrations]


def calibrated(pipe: Any, count: int) -> Calibration:
    prompts = read_prompts(FOLDER / "prompts" / "calibration.txt")[:count]
    return ertacache.calibrate(pipe, prompts, seeds=range(count), computed_steps=STEPS, effort="fast", **ARGUMENTS)


def with_lora(strength: float) -> Callable[[Any], None]:
    """Random low-rank changes of the attention, of `strength` times the size of the weights that they change."""

    def change(pipe: Any) -> None:
        import peft

        targets = ["to_q", "to_k", "to_v"]
        pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        generator = torch.Generator().manual_seed(0)
        for module in pipe.transformer.modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
                up.copy_(torch.randn(up.shape, generator=generator))
                up.mul_(strength * module.base_layer.weight.norm() / (up @ down).norm())

    return change


def to_int8(pipe: Any) -> None:
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipe.transformer = FluxTransformer2DModel.from_pretrained(
        FOLDER / "tiny" / "transformer",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,
    )


CHANGES = {
    "LoRA of 3 %": with_lora(0.03),
    "LoRA of 10 %": with_lora(0.1),
    "LoRA of 30 %": with_lora(0.3),
    "LoRA of 100 %": with_lora(1.0),
    "int8 weights": to_int8,
}


def table(record: dict[str, Any]) -> str:
    """Markdown: quality with the base model's calibration and with one for the changed weights."""
    header = ["Weights", "Base model's calibration, dB", "Recalibrated, dB"]
    lines = [
        [row["weights"], *(_number(row[name]) for name in ("base_psnr", "recalibrated_psnr"))] for row in record["rows"]
    ]
    about = (
        f"{record['model']} pipeline on a CPU, {record['computed_steps']} steps computed, {record['prompts']} held-out "
        f"prompts, {record['calibration_prompts']} calibration prompts:"
    )
    return f"{about}\n\n{grid(header, lines)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what changed weights cost.")
    parser.add_argument("--page", action="store_true", help="measure nothing: put the table into docs/compatibility.md")
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts")
    parser.add_argument("--calibration-prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(argv)
    if chosen.page:
        fill(PAGE, table(json.loads(RESULT.read_text(encoding="utf-8"))), MARKER)
        return 0
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"needs {' and '.join(absent)}: .venv/bin/python -m pip install {' '.join(absent)}", file=sys.stderr)
        return 1
    base = FluxPipeline.from_pretrained(FOLDER / "tiny", dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    calibration = calibrated(base, chosen.calibration_prompts)
    (unchanged,) = quality(base, [calibration], chosen.prompts)
    rows = [{"weights": "unchanged", "base_psnr": unchanged, "recalibrated_psnr": None}]
    for name, change in CHANGES.items():
        pipe = FluxPipeline(**{**base.components, "transformer": copy.deepcopy(base.transformer)})
        pipe.set_progress_bar_config(disable=True)
        change(pipe)
        again = calibrated(pipe, chosen.calibration_prompts)
        before, after = quality(pipe, [calibration, again], chosen.prompts)
        rows.append({"weights": name, "base_psnr": before, "recalibrated_psnr": after})
        print(rows[-1])
    record = {
        **machine(torch.device("cpu"), torch.float32),
        "model": "embedded FLUX",
        "computed_steps": f"{STEPS} of 28",
        "prompts": chosen.prompts,
        "calibration_prompts": chosen.calibration_prompts,
        "rows": rows,
    }
    write("changed_weights", record, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
