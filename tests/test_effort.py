"""What a calibration says of its cost, and the limit of what it keeps in memory."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import ToyPipeline, curved

import ertacache
from ertacache.cli import kept, settings
from ertacache.cli.folder import ModelFolder
from ertacache.errors import CalibrationError, UsageError
from ertacache.fit import cost, recipe
from ertacache.fit.cost import most_evaluations
from ertacache.fit.end_to_end import fit_end_to_end
from ertacache.fit.store import TrajectoryStore

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in ROOT.glob("ERTACache4*/config.py"))
TRAJECTORIES = 25 * 4 * 3 * 4 * 4 * 4  # 2 N + 1 tensors (4, 3, 4, 4) of float32
PROMPTS = ["a", "b", "c", "d"]
STEPS = 12


def calibrate(pipe, **asked):
    asked = {"num_inference_steps": STEPS, "seeds": range(4), "micro_batch": 1, **asked}
    return ertacache.calibrate(pipe, PROMPTS, **asked)


def evaluations(text: str, kind: str) -> int:
    """The number in the line that begins with `kind`."""
    return int(re.search(rf"calibration: {kind} \S+ uncached runs \((\d+) transformer evaluations\)", text).group(1))


# -- evaluations -------------------------------------------------------------------------------------------


def test_the_bound_by_hand():
    """P (N + K), P (N + 3 K) with two folds, and 100 N where these leave some; 4, and 4 K of plain reuse, to check."""
    assert most_evaluations("fast", prompts=8, steps=28, computed=14) == (28 + 14) * 8 + 4
    assert most_evaluations("balanced", 8, 28, 14) == (28 + 3 * 14) * 8 + 4 + 4 * 14
    assert most_evaluations("balanced", 3, 28, 14) == (28 + 3 * 14) * 3 + 4 + 3 * 14
    assert most_evaluations("best", 8, 28, 14) == 100 * 28
    assert most_evaluations("best", 64, 28, 14) == (28 + 3 * 14) * 64 + 4 + 4 * 14


@pytest.mark.parametrize("computed", [2, 6, 11])
def test_what_fast_announces_is_spent(computed, capsys):
    pipe = ToyPipeline(curved)
    calibrate(pipe, effort="fast", computed_steps=computed)
    said = capsys.readouterr().err
    assert (
        pipe.transformer.calls
        == evaluations(said, "at most")
        == evaluations(said, "took")
        == 4 * (STEPS + computed) + 4
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"computed_steps": 5},
        {"speedup": 2.0},
        {"computed_steps": 12},
        {"computed_steps": 1},
        {"computed_steps": 5, "effort": "best"},
        {"computed_steps": 6, "method": "paper"},
        {"threshold": 0.05, "method": "paper"},
        {"min_psnr": 60.0},
        {"min_psnr": 119.0, "effort": "best"},
    ],
    ids=str,
)
def test_what_it_takes_is_counted_and_below_what_was_announced(asked, capsys):
    pipe = ToyPipeline(curved)
    calibrate(pipe, **asked)
    said = capsys.readouterr().err
    most = evaluations(said, "at most")
    assert evaluations(said, "took") == pipe.transformer.calls
    assert 0.1 * most < pipe.transformer.calls <= most


def test_best_takes_fewer_prompts_where_the_cost_would_be_exceeded(capsys, monkeypatch):
    """A tenth of an uncached run a prompt buys no fit end to end; what it buys is spent on one."""
    seen = []
    monkeypatch.setattr(recipe, "fit_end_to_end", lambda runs, *_: seen.append(len(runs)) or fit_end_to_end(runs, *_))
    for runs in (100, 14, 9):
        monkeypatch.setattr(cost, "BEST_RUNS", runs)
        pipe = ToyPipeline(curved)
        calibrate(pipe, effort="best", computed_steps=5)
        assert (
            pipe.transformer.calls
            <= evaluations(capsys.readouterr().err, "at most")
            <= max(runs * STEPS, most_evaluations("balanced", 4, STEPS, 5))
        )
    assert seen == [4]


def test_guidance_in_two_calls_counts_as_one_evaluation(capsys):
    pipe = ToyPipeline(curved, guidance_scale=3.0)
    calibrate(pipe, computed_steps=5)
    said = capsys.readouterr().err
    assert 2 * evaluations(said, "took") == pipe.transformer.calls


def test_it_is_said_before_the_first_evaluation(capsys):
    pipe = ToyPipeline(curved)
    said = []
    original = pipe.transformer.velocity
    pipe.transformer.velocity = lambda x, s: (said.append(capsys.readouterr().err), original(x, s))[1]
    calibrate(pipe, computed_steps=5)
    assert evaluations(said[0], "at most") == (STEPS + 3 * 5) * 4 + 4 + 4 * 5
    assert not any("transformer evaluations" in text for text in said[1:])


def test_no_evaluation_is_spent_on_a_request_that_cannot_be():
    pipe = ToyPipeline(curved)
    with pytest.raises(CalibrationError, match="between 1 and 12"):
        calibrate(pipe, computed_steps=13)
    assert pipe.transformer.calls == 0 and "_ertacache" not in vars(pipe)


def test_without_progress_nothing_is_said(capsys):
    calibrate(ToyPipeline(curved), computed_steps=5, progress=False)
    assert capsys.readouterr().err == ""


# -- memory ------------------------------------------------------------------------------------------------


def test_a_calibration_from_files_is_the_same_and_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written, keep = [], TrajectoryStore.keep

    def watched(*args):
        kept = keep(*args)
        written.append(len(list(tmp_path.iterdir())))
        return kept

    monkeypatch.setattr(TrajectoryStore, "keep", watched)
    made = []
    for limit in (TRAJECTORIES, TRAJECTORIES - 1):
        made.append(calibrate(ToyPipeline(curved), computed_steps=5, memory_limit=limit, progress=False))
        assert max(written) == (limit < TRAJECTORIES) and not list(tmp_path.iterdir())
    assert made[0] == made[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_keep_the_runs_own_dtype(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, tensor = TrajectoryStore(0), torch.randn(2, 3, 5).to(dtype)
    store.plan(tensor.nbytes)
    kept = store.keep(tensor.transpose(0, 1))
    assert kept.dtype == dtype and torch.equal(kept, tensor.transpose(0, 1))
    assert next(Path(store.place).iterdir()).stat().st_size == tensor.nbytes


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CalibrationError, match="above the memory limit"):
        calibrate(ToyPipeline(curved), computed_steps=5, memory_limit=0, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_has_the_limit_as_a_flag(folder):
    assert settings.parse(folder, [], "test").memory_limit() is None
    chosen = settings.parse(folder, ["--memory-limit-gib", "1.5"], "test")
    settings.check(chosen)
    assert chosen.memory_limit() == 1.5 * 2**30
    for bad in ("-1", "nan", "inf"):
        with pytest.raises(UsageError, match="--memory-limit-gib must be 0 or more"):
            settings.check(settings.parse(folder, ["--memory-limit-gib", bad], "test"))


class Stop(Exception):
    """Ends a test where what it asks about is known."""


def test_the_flag_reaches_the_calibration(monkeypatch):
    chosen = settings.parse(FOLDERS[0], ["--model", "tiny", "--memory-limit-gib", "0.5"], "test")
    given = []

    def taken(*_, **keywords):
        given.append(keywords["memory_limit"])
        raise Stop

    monkeypatch.setattr(recipe, "calibrate", taken)
    with pytest.raises(Stop):
        kept.new_calibration(None, chosen, ModelFolder("made up", lambda _: {}, lambda *_: None))
    assert given == [2**29]
