"""What the golden tests compare: runs whose results were kept before a rebuilding. Holds no test.

`python tests/golden_runs.py` writes what `calibrate` makes anew, with --latents the latents too: only where a change
of them is meant.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from toys import ToyPipeline, curved

import ertacache

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "golden"
LATENTS = FOLDER / "latents.safetensors"
CALIBRATIONS = FOLDER / "calibrations.json"
MODELS = ("flux", "wan", "cogvideox", "opensora")
VALUES = 1024  # of the final latents that are kept, evenly spread
PROMPTS = [f"prompt {i}" for i in range(8)]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"computed_steps": 5},
    "speedup": {"speedup": 2.0},
    "min_psnr": {"min_psnr": 60.0},
    "all_computed": {"computed_steps": 12},
    "one_computed": {"computed_steps": 1},
    "fast": {"computed_steps": 5, "effort": "fast"},
    "best": {"computed_steps": 5, "effort": "best"},
    "paper": {"computed_steps": 6, "method": "paper"},
    "paper_threshold": {"threshold": 0.3, "method": "paper", "phi_over": "change"},
}


def sampled(latents: Tensor) -> Tensor:
    """VALUES of the final latents, evenly spread."""
    flat = latents.float().flatten()
    return flat[torch.linspace(0, len(flat) - 1, VALUES).round().long()].clone()


def calibration_files(model: str) -> list[Path]:
    """Calibrations that earlier versions made for a model's tiny pipeline, with all that a file may hold."""
    return sorted((FOLDER / "calibrations" / model).glob("tiny-*.json"))


def restore(pipe: Any, configs: dict[str, dict[str, Any]]) -> None:
    """Give a pipeline the transformer and the scheduler that its calibrations were made for, with random weights."""
    for name, changes in configs.items():
        part = getattr(pipe, name)
        torch.manual_seed(0)
        made = type(part).from_config({**part.config, **changes})
        setattr(pipe, name, made.eval() if isinstance(made, torch.nn.Module) else made)


def final_latents(model: str, files: list[Path]) -> dict[str, Tensor]:
    """File name -> `sampled` final latents of the folder's first example, on its tiny pipeline."""
    from tiny_pipelines import FOLDERS, tiny_pipeline

    pipe, chosen, module = tiny_pipeline(model)
    earlier = FOLDER / "calibrations" / model / "pipeline.json"  # where the tiny pipeline has been replaced since
    if earlier.exists():
        restore(pipe, json.loads(earlier.read_text(encoding="utf-8")))
    prompt = (FOLDERS[model] / chosen.prompts).read_text(encoding="utf-8").splitlines()[0]
    made = {}
    for file in files:
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad(), ertacache.apply(pipe, file):
            arguments = module.MODEL_FOLDER.arguments(chosen)
            made[file.name] = sampled(pipe(prompt=prompt, generator=generator, output_type="latent", **arguments)[0])
    return made


def toy_calibration(name: str) -> dict[str, Any]:
    """What `calibrate` makes of the toy pipeline with a set of options, as JSON data."""
    made = ertacache.calibrate(
        ToyPipeline(curved), PROMPTS, seeds=range(8), num_inference_steps=12, progress=False, **OPTIONS[name]
    )
    return made.to_dict()


if __name__ == "__main__":
    sys.path.append(str(HERE.parent / "bench"))
    FOLDER.mkdir(exist_ok=True)
    if "--latents" in sys.argv:  # of calibrations that earlier versions made: only for other weights
        made = {k: v for model in MODELS for k, v in final_latents(model, calibration_files(model)).items()}
        save_file(made, LATENTS)
    CALIBRATIONS.write_text(json.dumps({name: toy_calibration(name) for name in OPTIONS}, indent=1) + "\n")
