"""Golden results: final latents of calibrations that earlier versions made, and what `calibrate` makes of a toy."""

import json

import pytest
import torch
from golden_runs import (
    CALIBRATIONS,
    LATENTS,
    MODELS,
    OPTIONS,
    calibration_files,
    final_latents,
    toy_calibration,
)
from safetensors.torch import load_file

TOLERANCE = 1e-5
PROVENANCE = ("versions", "date")


@pytest.mark.parametrize("model", MODELS)
def test_calibrations_of_earlier_versions_give_the_same_latents(model):
    kept = load_file(LATENTS)
    files = [file for file in calibration_files(model) if file.name in kept]
    assert len(files) == 3
    for name, latents in final_latents(model, files).items():
        torch.testing.assert_close(latents, kept[name], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", OPTIONS)
def test_calibrate_makes_the_same_of_the_toy(name):
    kept, made = json.loads(CALIBRATIONS.read_text())[name], toy_calibration(name)
    assert made.keys() == kept.keys()
    for field, value in kept.items():
        if field not in PROVENANCE:
            assert_alike(made[field], value, f"{name}: {field}")


def assert_alike(made, kept, where: str) -> None:
    """Equal, and numbers to TOLERANCE, whatever they lie in."""
    if isinstance(kept, dict):
        assert made.keys() == kept.keys(), where
        for key in kept:
            assert_alike(made[key], kept[key], f"{where}.{key}")
    elif isinstance(kept, list):
        assert len(made) == len(kept), where
        for index, (one, other) in enumerate(zip(made, kept, strict=True)):
            assert_alike(one, other, f"{where}[{index}]")
    elif isinstance(kept, float):
        assert made == pytest.approx(kept, abs=TOLERANCE, rel=1e-4), where
    else:
        assert made == kept, where
