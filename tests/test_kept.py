"""Which kept calibration serves a run: what the file holds decides, and neither its name nor its age."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toys import ToyPipeline, curved

from compare.study import kept_calibration
from ertacache.calibration import Calibration
from ertacache.cli import kept, settings
from ertacache.cli.folder import ModelFolder
from ertacache.errors import CalibrationError

pytestmark = pytest.mark.core

CONFIG = """
MODEL = "tiny"
PROMPTS = "prompts.txt"
METHOD = "ertacache"
HEIGHT = 64
WIDTH = 64
NUM_INFERENCE_STEPS = 6
GUIDANCE_SCALE = 3.5
NEGATIVE_PROMPT = ""
SPEEDUP: float | None = 2.0
COMPUTED_STEPS: int | None = None
MIN_PSNR: float | None = None
THRESHOLD: float | None = None
PHI_OVER = "output"
CALIBRATION: str | None = None
CALIBRATION_FOLDER = "calibration"
CALIBRATION_PROMPTS = "calibration.txt"
NUM_CALIBRATION_PROMPTS = 2
MICRO_BATCH = 8
EFFORT = "balanced"
"""


class Pipeline(ToyPipeline):
    """Takes guidance and a negative prompt, as those of the folders do."""

    def __call__(self, prompt, guidance_scale=1.0, negative_prompt="", **kwargs):
        self.guidance_scale = guidance_scale
        return super().__call__(prompt, **kwargs)


def arguments(chosen) -> dict:
    return {name: getattr(chosen, name) for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}


MODEL = ModelFolder("toy", arguments, lambda *_: None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "calibration.txt").write_text("a\nb\nc\nd\n")
    return tmp_path


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(curved)


def asked(folder, *argv: str) -> settings.Settings:
    return settings.parse(folder, list(argv), "test")


def obtain(pipe, folder, *argv: str):
    return kept.obtain_calibration(pipe, asked(folder, *argv), MODEL, progress=False)


def test_a_calibration_is_made_once(pipe, folder):
    made, path = obtain(pipe, folder)
    calls = pipe.transformer.calls
    assert obtain(pipe, folder) == (made, path) and pipe.transformer.calls == calls
    assert Calibration.load(path) == made and path.parent == folder / "calibration"


def test_the_name_is_for_people_alone(pipe, folder):
    made, path = obtain(pipe, folder)
    other = path.rename(path.with_name("whatever.json"))
    assert obtain(pipe, folder) == (made, other)


@pytest.mark.parametrize(
    "argv",
    [
        ["--negative-prompt", "blurry"],
        ["--guidance-scale", "4"],
        ["--num-inference-steps", "7"],
        ["--speedup", "3"],
        ["--computed-steps", "4"],
        ["--min-psnr", "20"],
        ["--method", "paper"],
    ],
    ids=lambda argv: argv[0],
)
def test_another_call_or_goal_is_calibrated_anew(argv, pipe, folder):
    first, path = obtain(pipe, folder)
    second, other = obtain(pipe, folder, *argv)
    assert path != other and len(list(path.parent.iterdir())) == 2
    assert Calibration.load(path) == first and Calibration.load(other) == second
    assert kept.kept_path(pipe, asked(folder), MODEL) == path
    assert kept.kept_path(pipe, asked(folder, *argv), MODEL) == other


def test_a_taken_name_gets_a_number(pipe, folder):
    """The name does not tell one negative prompt from another."""
    paths = [obtain(pipe, folder, "--negative-prompt", text)[1] for text in ("", "blurry", "dark")]
    stem = paths[0].stem
    assert [path.stem for path in paths] == [stem, f"{stem}-2", f"{stem}-3"]


def test_the_same_number_of_steps_is_the_same_goal(pipe, folder):
    path = obtain(pipe, folder, "--speedup", "2")[1]
    assert obtain(pipe, folder, "--computed-steps", "3")[1] == path


def other_scheduler(pipe) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def other_weights(pipe) -> None:
    with torch.no_grad():
        pipe.transformer.weight.add_(1)


def other_dtype(pipe) -> None:
    pipe.transformer.to(torch.bfloat16)


@pytest.mark.parametrize("change", [other_scheduler, other_weights, other_dtype])
def test_another_pipeline_is_calibrated_anew(change, pipe, folder):
    path = obtain(pipe, folder)[1]
    change(pipe)
    assert kept.kept_path(pipe, asked(folder), MODEL) is None
    assert obtain(pipe, folder)[1] != path


EFFORTS = ("fast", "balanced", "best")


@pytest.mark.parametrize("wanted", EFFORTS)
@pytest.mark.parametrize("there", EFFORTS)
def test_a_file_of_more_effort_serves_and_one_of_less_does_not(there, wanted, pipe, folder):
    path = obtain(pipe, folder, "--effort", there)[1]
    serves = EFFORTS.index(there) >= EFFORTS.index(wanted)
    assert (kept.kept_path(pipe, asked(folder, "--effort", wanted), MODEL) == path) == serves


def test_the_file_that_most_effort_went_into_is_taken(pipe, folder):
    paths = [obtain(pipe, folder, "--effort", effort)[1] for effort in EFFORTS]
    assert kept.kept_path(pipe, asked(folder, "--effort", "fast"), MODEL) == paths[2]
    paths[2].unlink()
    assert kept.kept_path(pipe, asked(folder, "--effort", "fast"), MODEL) == paths[1]


@pytest.mark.parametrize(("older", "effort"), [({}, "fast"), ({"refine": 0}, "fast"), ({"refine": 8}, "best")])
def test_files_of_before_efforts_had_names_count_as_what_they_did(older, effort, pipe, folder):
    made, path = obtain(pipe, folder)
    settings_of = {name: value for name, value in made.settings.items() if name != "effort"} | older
    replace(made, settings=settings_of).save(path)
    for wanted in EFFORTS:
        serves = EFFORTS.index(effort) >= EFFORTS.index(wanted)
        assert (kept.kept_path(pipe, asked(folder, "--effort", wanted), MODEL) == path) == serves


def test_the_published_method_knows_no_effort(pipe, folder):
    path = obtain(pipe, folder, "--method", "paper", "--effort", "fast")[1]
    assert obtain(pipe, folder, "--method", "paper", "--effort", "best")[1] == path


def test_the_two_definitions_of_phi_have_files_of_their_own(pipe, folder):
    paths = [obtain(pipe, folder, "--method", "paper", "--phi-over", over)[1] for over in ("output", "change")]
    for over, path in zip(("output", "change"), paths, strict=True):
        assert kept.kept_path(pipe, asked(folder, "--method", "paper", "--phi-over", over), MODEL) == path


def test_a_damaged_file_is_named_in_a_line_and_left_out(pipe, folder, capsys):
    path = obtain(pipe, folder)[1]
    capsys.readouterr()
    path.with_name("damaged.json").write_text(path.read_text()[:100])
    path.with_name("a-folder.json").mkdir()
    assert obtain(pipe, folder)[1] == path
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("left out: ") for line in lines)
    assert "a-folder.json" in lines[0] and "damaged.json" in lines[1]


def test_a_file_that_is_asked_for_is_taken_whatever_it_holds(pipe, folder, monkeypatch):
    path = obtain(pipe, folder)[1]
    named = path.rename(folder / "mine.json")
    argv = ["--calibration", str(named)]
    assert obtain(pipe, folder, *argv, "--guidance-scale", "9")[1] == named
    with pytest.raises(CalibrationError, match="use --method ertacache with it"):
        obtain(pipe, folder, *argv, "--method", "paper")
    named.write_text("{}")
    with pytest.raises(CalibrationError, match=r"mine\.json: field 'schema'"):
        obtain(pipe, folder, *argv)


# -- on the prompts of the folder --------------------------------------------------------------------------


def test_a_comparison_takes_a_file_on_its_own_prompts(pipe, folder):
    made, path = obtain(pipe, folder)
    assert kept_calibration(pipe, asked(folder), MODEL) == made
    assert kept_calibration(pipe, asked(folder, "--num-calibration-prompts", "3"), MODEL) is None
    (folder / "calibration.txt").write_text("a\nsomething else\n")
    assert kept_calibration(pipe, asked(folder), MODEL) is None
    assert kept.kept_path(pipe, asked(folder), MODEL) == path  # which run.sh takes all the same


def test_a_comparison_takes_a_file_on_more_prompts(pipe, folder):
    made = obtain(pipe, folder, "--num-calibration-prompts", "4")[0]
    assert kept_calibration(pipe, asked(folder), MODEL) == made


def test_a_comparison_takes_a_file_of_just_the_asked_effort(pipe, folder):
    """Since it says what an effort brings."""
    best = obtain(pipe, folder, "--effort", "best")[0]
    assert kept_calibration(pipe, asked(folder, "--effort", "best"), MODEL) == best
    assert kept_calibration(pipe, asked(folder), MODEL) is None


@pytest.mark.parametrize("count", [None, "two", 9])
def test_a_file_that_does_not_say_its_prompts_is_not_compared(count, pipe, folder):
    made, path = obtain(pipe, folder)
    path.write_text(json.dumps(replace(made, prompts={**made.prompts, "count": count}).to_dict()))
    assert kept_calibration(pipe, asked(folder), MODEL) is None
