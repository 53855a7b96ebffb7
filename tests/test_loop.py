"""The loop on the front page and on the method's page is what `apply` does, on the tiny FLUX pipeline."""

import json
import re

import pytest
import torch
from golden_runs import calibration_files, restore
from page_texts import FIRST_FOLDER, ROOT
from tiny_pipelines import tiny_pipeline

import ertacache

PAGES = ("README.md", "docs/method.md")


def loop(page: str) -> str:
    """The page's Python block that samples."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if "history = []" in block]
    return found


def test_both_pages_show_the_same_loop():
    assert loop(PAGES[0]) == loop(PAGES[1])


@pytest.fixture(scope="module")
def pipelines():
    """Today's tiny pipeline, and the one that the golden calibrations were made for."""
    now, earlier = tiny_pipeline("flux"), tiny_pipeline("flux")
    restore(earlier[0], json.loads((GOLDEN / "pipeline.json").read_text()))
    return {FIRST_FOLDER / "calibration": now, GOLDEN: earlier}


GOLDEN = ROOT / "tests" / "golden" / "calibrations" / "flux"
FILES = [*(FIRST_FOLDER / "calibration").glob("tiny-*.json"), *calibration_files("flux")]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda p: p.stem)
def test_the_loop_makes_the_latents_of_apply(path, pipelines):
    calibration = ertacache.Calibration.load(path)
    if calibration.channel_coefficients is not None:
        pytest.skip("the loop has no matrices of channels")
    pipe, chosen, module = pipelines[path.parent]
    prompt = (FIRST_FOLDER / chosen.prompts).read_text(encoding="utf-8").splitlines()[0]
    calls = []
    forward = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad(), ertacache.apply(pipe, calibration):
        generator = torch.Generator("cpu").manual_seed(0)
        arguments = module.MODEL_FOLDER.arguments(chosen)
        applied = pipe(prompt=prompt, generator=generator, output_type="latent", **arguments)[0]
    forward.remove()
    first, rest = calls[0], {k: v for k, v in calls[0].items() if k not in ("hidden_states", "timestep")}

    def model(x, sigma):
        return pipe.transformer(hidden_states=x, timestep=torch.full((len(x),), sigma), **rest)[0]

    fitted = calibration.combinations()
    names = {"N": calibration.num_inference_steps, "sigma": calibration.sigmas, "schedule": calibration.computed_steps}
    names |= {"coefficients": fitted.outputs, "b": fitted.latents, "model": model, "x": first["hidden_states"]}
    with torch.no_grad():
        exec(compile(loop(PAGES[0]), PAGES[0], "exec"), names)
    torch.testing.assert_close(names["x"], applied, atol=2e-5, rtol=0)
