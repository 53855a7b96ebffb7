"""Numbers that are typed on the pages are those of the settings and of the recipe."""

import ast
import re

import pytest
from page_texts import FOLDERS, ROOT

from ertacache.cli import settings
from ertacache.fit.cost import most_evaluations


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_settings_on_a_folders_page_are_those_of_its_config(folder):
    constants = settings.read_constants(folder / "config.py")
    said = re.findall(r"`([A-Z_]+) = ([^`]+)`", (folder / "README.md").read_text(encoding="utf-8"))
    assert {"NUM_INFERENCE_STEPS", "GUIDANCE_SCALE", "DTYPE"} <= {name for name, _ in said}
    for name, value in said:
        assert ast.literal_eval(value) == constants[name.lower()][0], f"{name} = {value}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_the_cost_of_a_calibration_is_that_of_the_default(folder):
    constants = {name: value for name, (value, _) in settings.read_constants(folder / "config.py").items()}
    steps, prompts = constants["num_inference_steps"], constants["num_calibration_prompts"]
    most = most_evaluations(constants["effort"], prompts, steps, int(steps / constants["speedup"]))
    page = (folder / "README.md").read_text(encoding="utf-8")
    product, runs = re.search(r"prompts \+ \d+ = (\d+) .*time of (\d+) uncached", page).groups()
    assert (int(product), int(runs)) == (most, round(most / steps))
    assert f"(the time of {runs} uncached results, once)" in (ROOT / "README.md").read_text(encoding="utf-8")
