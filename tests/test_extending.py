"""docs/extending.md, run as it stands: a pipeline that no folder is for, in a script and as a folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ertacache.calibration import Calibration
from ertacache.metrics import psnr

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[str]:
    """The Python of a section of the page."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The names of the script after it ran, its own assertions included, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("script")
    names = {"__name__": "example"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in blocks("In a script"):
            exec(compile(code, "docs/extending.md", "exec"), names)
    return names, folder


def test_the_script_accelerates_a_pipeline_that_no_folder_is_for(example):
    names, folder = example
    made = Calibration.load(folder / "pixart-20-2x.json")
    assert made == names["calibration"] and made.predicted["psnr"] > 40
    assert made.model["class"] == "PixArtTransformer2DModel"
    quality = psnr(names["picture"], names["reference"])
    ten_steps = psnr(names["sample"](num_inference_steps=10), names["reference"])
    assert quality > ten_steps + 6


def test_the_folder_runs(example, tmp_path, capsys):
    """Its generate.py beside FLUX's config.py, on the pipeline of the script."""
    pipe = example[0]["pipe"]
    pipe.save_pretrained(tmp_path / "model")
    (generate,) = blocks("As a folder")
    folder = tmp_path / "ERTACache4PixArt"
    (folder / "prompts").mkdir(parents=True)
    (folder / "generate.py").write_text(generate, encoding="utf-8")
    shutil.copy(ROOT / "ERTACache4FLUX" / "config.py", folder)
    (folder / "prompts" / "calibration.txt").write_text("a red fox\na blue boat\n", encoding="utf-8")
    names = {"__name__": "generate", "__file__": str(folder / "generate.py"), "__doc__": "generate"}
    exec(compile(generate, "docs/extending.md", "exec"), names)
    flags = "--dtype float32 --height 16 --width 16 --max-sequence-length 24 --num-inference-steps 6 --computed-steps 3"
    where = ["--model", str(tmp_path / "model"), "--prompt", "a green hill", "--out", str(tmp_path / "out")]
    names["main"]([*where, *flags.split(), "--compare"])
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / record["files"][0]).read_bytes().startswith(b"\x89PNG")
    assert len(record["computed_steps"]) == 3 and record["compare"]["psnr"][0] > 20
    assert len(list((folder / "calibration").glob("model-16x16-n6-*-k3.json"))) == 1
    assert "3 of 6 computed" in capsys.readouterr().out


def test_the_page_names_files_that_folders_have():
    table = PAGE.split("## As a folder\n")[1]
    cells = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    listed = {name.rstrip("/") for cell in cells for name in re.findall(r"`([\w./]+)`", cell)}
    ignored = {"__pycache__", "sample", "reproduced"}
    assert listed == {path.name for path in (ROOT / "ERTACache4FLUX").iterdir()} - ignored


def test_exactness_needs_every_step_computed(example):
    """The page's check can fail: with half of the steps the result is another one."""
    names = example[0]
    assert not torch.equal(names["picture"], names["reference"])
