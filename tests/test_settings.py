"""Flags and constants: precedence, goals, and one clear error for what cannot be."""

import pytest

from ertacache.cli import settings
from ertacache.errors import UsageError

pytestmark = pytest.mark.core

CONFIG = '''
"""Constants."""
MODEL = "auto"
PROMPTS = "prompts.txt"
METHOD = "ertacache"
EFFORT = "balanced"
DTYPE = "bfloat16"
OFFLOAD = "none"
HEIGHT = 1024
WIDTH = 1024
NUM_INFERENCE_STEPS = 28
GUIDANCE_SCALE = 3.5
FLAG = False
SPEEDUP: float | None = 2.0
COMPUTED_STEPS: int | None = None
MIN_PSNR: float | None = None
THRESHOLD: float | None = None
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "tiny.py").write_text("HEIGHT = 64\nWIDTH = 64\n")
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    return tmp_path


def parse(folder, *argv):
    chosen = settings.parse(folder, list(argv), "test")
    settings.check(chosen)
    return chosen


def test_every_constant_is_a_flag(folder):
    chosen = parse(folder, "--num-inference-steps", "10", "--guidance-scale", "2", "--flag", "true", "--model", "tiny")
    assert (chosen.num_inference_steps, chosen.guidance_scale, chosen.flag, chosen.model) == (10, 2.0, True, "tiny")


def test_flag_beats_override_beats_config(folder):
    chosen = parse(folder, "--width", "32")
    settings.apply_overrides(chosen, folder / "tiny.py")
    assert (chosen.width, chosen.height, chosen.num_inference_steps) == (32, 64, 28)


def test_a_goal_given_as_a_flag_clears_the_configured_one(folder):
    assert parse(folder).goal() == ("speedup", 2.0)
    assert parse(folder, "--computed-steps", "10").goal() == ("computed_steps", 10)
    assert parse(folder, "--min-psnr", "30").goal() == ("min_psnr", 30.0)
    assert parse(folder, "--method", "paper", "--threshold", "0.6").goal() == ("threshold", 0.6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--num-inf", "9"], "--num-inf"),
        (["--height", "tall"], "'tall' is not of type int"),
        (["--height", "0"], "--height must be 1 or more"),
        (["--method", "magic"], "--method must be one of"),
        (["--effort", "most"], "--effort must be one of fast, balanced, best"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--speedup", "0.5"], "--speedup must lie between 1 and"),
        (["--speedup", "2", "--computed-steps", "3"], "give one of"),
        (["--computed-steps", "29"], "--computed-steps must lie between 1 and"),
        (["--threshold", "0.5"], "belongs to --method paper"),
        (["--min-psnr", "200"], "--min-psnr"),
        (["--prompt", "a", "--prompts", "b.txt"], "not both"),
        (["--flag", "perhaps"], "not true or false"),
    ],
)
def test_bad_flags_are_one_clear_line(folder, argv, message):
    with pytest.raises(UsageError) as error:
        parse(folder, *argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_flag_that_was_not_given_is_in_no_conflict(folder):
    """Flags of a command have defaults, which go before the config's but are not what anybody gave."""
    extra = [("--prompts", {"default": None}), ("--computed-steps", {"type": int, "default": 7})]
    chosen = settings.parse(folder, ["--prompt", "x", "--speedup", "3"], "test", extra)
    assert chosen.given == {"prompt", "speedup"} and chosen.speedup == 3.0 and chosen.prompts is None
    assert settings.parse(folder, [], "test", extra).computed_steps == 7
    settings.apply_overrides(chosen, folder / "config.py")
    assert chosen.prompts is None


def test_prompts(folder):
    assert settings.prompts_of(parse(folder)) == ["one", "two"]
    assert settings.prompts_of(parse(folder, "--prompt", "x", "--prompt", "y")) == ["x", "y"]
    with pytest.raises(UsageError, match="is empty"):
        settings.prompts_of(parse(folder, "--prompt", " "))
    with pytest.raises(UsageError, match="cannot be read"):
        settings.prompts_of(parse(folder, "--prompts", str(folder / "missing.txt")))
    (folder / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no prompt"):
        settings.prompts_of(parse(folder, "--prompts", str(folder / "empty.txt")))


def test_a_path_starts_from_the_folder_in_a_file_and_from_here_as_a_flag(folder, monkeypatch, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    (here / "prompts.txt").write_text("three\n")
    assert parse(folder).path("prompts") == folder / "prompts.txt"
    assert settings.prompts_of(parse(folder)) == ["one", "two"]
    assert parse(folder, "--prompts", "prompts.txt").path("prompts").resolve() == here / "prompts.txt"
    assert settings.prompts_of(parse(folder, "--prompts", "prompts.txt")) == ["three"]
