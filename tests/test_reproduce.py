"""The comparison end to end on the embedded FLUX pipeline at few steps: interrupted, resumed, laid out for VBench."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from toys import plain_fields

from compare import reproduce, study
from compare.comparison import Comparison
from ertacache.calibration import Calibration
from ertacache.cli import kept, settings
from ertacache.cli.folder import ModelFolder
from ertacache.cli.media import png_bytes
from ertacache.errors import UsageError
from ertacache.files import write_atomically
from ertacache.fit import recipe

FOLDER = Path(__file__).parents[1] / "ERTACache4FLUX"
PROMPTS = ["a red circle at the left", "a large blue star at the top"]
ONE = ["--num-prompts", "1", "--computed-steps", "3"]
TIMED = ("denoise_seconds", "speedup")


def arguments(chosen) -> dict:
    return {
        "height": 32,
        "width": 32,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": 3.5,
        "max_sequence_length": 40,
    }


def save(picture, path, _) -> Path:
    return write_atomically(path.with_name(path.name + ".png"), png_bytes(picture))


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(FOLDER / "tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    monkeypatch.setattr(study, "TIMING_REPEATS", 1)


def run(pipe, out: Path, *argv: str) -> Path:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    fast = ["--model", "tiny", "--num-inference-steps", "6", "--num-calibration-prompts", "2", "--seeds", "3"]
    fast += ["--methods", "none,ertacache,fewer-steps", "--computed-steps", "4,3", "--prompts", str(prompts)]
    model = ModelFolder("FLUX", arguments, save)
    return reproduce.main(FOLDER, lambda _: pipe, model, [*fast, "--out", str(out), *argv])


def rows(out: Path) -> list[dict]:
    found = json.loads((out / "results.json").read_text())
    found = found["rows"] if isinstance(found, dict) else found
    return [{k: v for k, v in row.items() if k not in TIMED} for row in found]


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_ends_the_same(pipe, tmp_path, monkeypatch):
    fitted = [*ONE, "--methods", "none,ertacache,oss"]  # a rival that is fitted says what it cost, resumed or not
    measured = []
    original = Comparison._metrics

    def interrupted(self, pictures):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return original(self, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, tmp_path / "a", *fitted)
    assert not (tmp_path / "a" / "results.json").exists()

    again = []
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_metrics", lambda self, p: again.append(1) or original(self, p))
        patch.setattr(recipe, "calibrate", lambda *_, **__: pytest.fail("calibrated once more"))
        run(pipe, tmp_path / "a", *fitted)
    # of the reference, ours and the rival two were done
    assert len(again) == 1
    run(pipe, tmp_path / "b", *fitted)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert [row["calibration_runs"] is None for row in rows(tmp_path / "a")] == [True, False, False]
    meta = json.loads((tmp_path / "a" / "results.meta.json").read_text())
    assert meta["command"].startswith("sh reproduce.sh --model tiny --num-inference-steps 6 ")
    assert set(meta["predicted"]) == {"ertacache 3"} and meta["predicted"]["ertacache 3"] > 10
    assert f"Made by `{meta['command']}`." in (tmp_path / "a" / "table.md").read_text()


@pytest.mark.slow
def test_another_cost_is_added_to_what_was_measured(pipe, tmp_path, monkeypatch):
    measured, original = [], Comparison._metrics
    monkeypatch.setattr(Comparison, "_metrics", lambda self, p: measured.append(1) or original(self, p))
    run(pipe, tmp_path, "--num-prompts", "1", "--computed-steps", "4")
    first = len(measured)
    run(pipe, tmp_path, "--num-prompts", "1", "--computed-steps", "4,3")
    assert (first, len(measured)) == (3, 5)  # the reference, ours and fewer steps; then the latter two once more


def test_what_is_not_asked_for_is_not_calibrated(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    run(pipe, tmp_path / "out", "--methods", "none,fewer-steps", "--seeds", "3", "--num-prompts", "1")
    assert {row["method"] for row in rows(tmp_path / "out")} == {"none", "fewer-steps"}


@pytest.mark.slow
def test_a_kept_calibration_is_compared_and_not_made_again(pipe, tmp_path, monkeypatch):
    """One that run.sh kept, on the same prompts and weights; with other prompts a new one is made."""
    asked = ["--calibration-folder", str(tmp_path), "--effort", "fast", "--computed-steps", "3"]
    argv = ["--model", "tiny", "--num-inference-steps", "6", "--num-calibration-prompts", "2", *asked]
    kept.obtain_calibration(pipe, settings.parse(FOLDER, argv, ""), ModelFolder("FLUX", arguments, save))
    (path,) = tmp_path.glob("*.json")
    changed = json.loads(path.read_text())
    changed |= {"computed_steps": [0, 1, 5], **plain_fields(6)}
    path.write_text(json.dumps(changed))
    few = [*asked, "--seeds", "3", "--num-prompts", "1", "--methods", "ertacache"]
    run(pipe, tmp_path / "same", *few)
    assert rows(tmp_path / "same")[1]["computed_steps"] == [0, 1, 5]
    changed["computed_steps"] = [0, 2, 5]
    path.write_text(json.dumps(changed))
    run(pipe, tmp_path / "same", *few)  # what was measured of the file before is not taken for this one's
    assert rows(tmp_path / "same")[1]["computed_steps"] == [0, 2, 5]
    run(pipe, tmp_path / "other", *few, "--num-calibration-prompts", "3")
    assert rows(tmp_path / "other")[1]["computed_steps"] != [0, 1, 5]
    with torch.no_grad():
        parameter = next(pipe.transformer.parameters())
        parameter.mul_(1.5)
        run(pipe, tmp_path / "weights", *few)
        parameter.div_(1.5)
    assert rows(tmp_path / "weights")[1]["computed_steps"] != [0, 1, 5]


@pytest.mark.slow
def test_vbench_layout(pipe, tmp_path):
    run(pipe, tmp_path / "o", "--layout", "vbench", "--seeds", "3,4", "--computed-steps", "3", "--methods", "ertacache")
    written = {str(p.relative_to(tmp_path / "o" / "vbench")) for p in (tmp_path / "o" / "vbench").rglob("*.*")}
    names = {f"{prompt}-{index}.png" for prompt in PROMPTS for index in (0, 1)}
    assert written == {f"{method}/{name}" for method in ("none-uncached", "ertacache-k-3") for name in names}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--speedup", "3"], "--speedup has no part in this command: use --computed-steps K1,K2"),
        (["--min-psnr", "40"], "use --computed-steps"),
        (["--threshold", "0.6", "--computed-steps", "14"], "use --computed-steps"),
        (["--method", "paper"], "use --methods A,B"),
        (["--calibration=mine.json"], "use --calibration-folder"),
        (["--prompt", "x", "--prompts", "file.txt"], "use --prompts FILE"),
        (["--prompt"], "use --prompts FILE"),
        (["--seed", "7"], "use --seeds S1,S2"),
    ],
)
def test_what_would_do_nothing_is_refused(argv, message):
    with pytest.raises(UsageError) as error:
        reproduce.parse(FOLDER, argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_other_flag_is_taken():
    flags = "--computed-steps 14,9 --seeds 0,1 --methods ertacache --num-prompts 2 --effort fast"
    rest = "--height 32 --width 32 --prompts p.txt --out o --calibration-folder c --layout vbench"
    chosen = reproduce.parse(FOLDER, f"{flags} {rest}".split())
    assert (chosen.computed_steps, chosen.seeds, chosen.num_prompts) == ([14, 9], [0, 1], 2)
    assert (chosen.effort, chosen.prompts) == ("fast", "p.txt")
    unset = reproduce.parse(FOLDER, [])
    settings.apply_overrides(unset, FOLDER / "tiny" / "config.py")
    assert (unset.computed_steps, unset.seeds, unset.prompts, unset.out) == (None, [1000, 1001], None, "reproduced")
    assert unset.height == 64 and not unset.given


def test_a_calibration_prompt_is_not_measured_on(pipe, tmp_path):
    seen = (FOLDER / "prompts" / "calibration.txt").read_text().splitlines()[0]
    (tmp_path / "p.txt").write_text(seen + "\n")
    with pytest.raises(UsageError, match="calibration prompt"):
        run(pipe, tmp_path / "o", "--prompts", str(tmp_path / "p.txt"))


def test_calibrations_go_where_a_flag_says_from_here(pipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("a red circle\n")
    flags = ["--calibration-folder", "mine", "--calibration-prompts", "mine.txt", "--num-inference-steps", "4"]
    chosen = settings.parse(FOLDER, [*flags, "--model", "tiny", "--effort", "fast"], "")
    assert kept.calibration_prompts(chosen) == ["a red circle"]
    made, path = kept.obtain_calibration(pipe, chosen, ModelFolder("FLUX", arguments, save), progress=False)
    assert Calibration.load(tmp_path / "mine" / path.name) == made
