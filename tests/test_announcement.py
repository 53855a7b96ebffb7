"""What a calibration says of its cost, and the limit of what it keeps in memory."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import ToyPipeline, curved

import ertacache
from compare import study
from ertacache import kept
from ertacache.announcement import Work, shown_size, shown_time
from ertacache.cli import settings
from ertacache.cli.folder import ModelFolder
from ertacache.errors import CalibrationError, UsageError
from ertacache.fit.schedule import growth_evaluations
from ertacache.fit.store import TrajectoryStore

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in ROOT.glob("ERTACache4*/config.py"))
TRAJECTORIES = 25 * 4 * 3 * 4 * 4 * 4  # 2 N + 1 tensors (4, 3, 4, 4) of float32
PROMPTS = ["a", "b", "c", "d"]


def calibrate(pipe, **asked):
    asked = {"num_inference_steps": 12, "seeds": range(4), "micro_batch": 1, **asked}
    return ertacache.calibrate(pipe, PROMPTS, **asked)


def announced(text: str) -> int:
    return int(re.search(r"calibration: (?:at most )?(\d+) transformer evaluations", text).group(1))


# -- evaluations -------------------------------------------------------------------------------------------


def test_evaluations_by_hand():
    """(N + (1 + F + tries) K) P, and four forms for each fold where there are tries."""
    assert Work(prompts=8, folds=2).evaluations(28, 14) == (28 + 3 * 14) * 8
    searched = Work(prompts=8, folds=2, search_budget=5).evaluations(28, 14)
    assert searched == (28 + (8 + 4 * 2) * 14) * 8 + growth_evaluations(28, 8)  # four forms, two folds each
    assert Work(prompts=8, folds=2, paper=True).evaluations(28, 14) == (28 + 2 * 14) * 8
    assert Work(prompts=8, folds=2, search_budget=5).evaluations(28, 28) == (28 + 2 * 28) * 8  # nothing to fit
    # of 4 steps: K = 2, then 3, then 4, which needs no fit
    assert Work(prompts=1, folds=2).most_for_any(4) == 4 + 3 * 2 + 3 * 3 + 2 * 4


@pytest.mark.parametrize("asked", [{"speedup": 2.0}, {"computed_steps": 12}])
def test_the_announced_number_is_spent(asked, capsys):
    pipe = ToyPipeline(curved)
    calibrate(pipe, **asked)
    assert pipe.transformer.calls == announced(capsys.readouterr().err)


def test_the_paper_spends_what_its_threshold_reaches(capsys):
    """No threshold may reach exactly K computed steps, on all prompts or in a fold; then there are fewer."""
    pipe = ToyPipeline(curved)
    calibrate(pipe, computed_steps=6, method="paper")
    total = announced(capsys.readouterr().err)
    assert total == (12 + 2 * 6) * 4 and 0.8 * total < pipe.transformer.calls <= total


@pytest.mark.parametrize("asked", [{"min_psnr": 60.0}, {"min_psnr": 119.0}, {"threshold": 0.05, "method": "paper"}])
def test_an_open_number_of_steps_is_announced_as_a_bound(asked, capsys):
    pipe = ToyPipeline(curved)
    calibrate(pipe, **asked)
    text = capsys.readouterr().err
    assert "at most" in text and pipe.transformer.calls <= announced(text)


def test_it_is_said_before_the_first_evaluation_and_the_time_after_the_first_step(capsys):
    pipe = ToyPipeline(curved)
    said = []
    original = pipe.transformer.velocity
    pipe.transformer.velocity = lambda x, s: (said.append(capsys.readouterr().err), original(x, s))[1]
    calibrate(pipe, computed_steps=5)
    assert announced(said[0]) == (12 + 3 * 5) * 4
    assert not any("transformer evaluations" in text for text in said[1:])
    second_step = said[len(PROMPTS)]
    assert re.search(r"calibration: about \d+ s at \S+ s a step; trajectories: .* in memory", second_step)


def test_no_evaluation_is_spent_on_a_request_that_cannot_be():
    pipe = ToyPipeline(curved)
    with pytest.raises(CalibrationError, match="between 1 and 12"):
        calibrate(pipe, computed_steps=13)
    assert pipe.transformer.calls == 0 and "_ertacache" not in vars(pipe)


def test_without_progress_nothing_is_said(capsys):
    calibrate(ToyPipeline(curved), computed_steps=5, progress=False)
    assert capsys.readouterr().err == ""


def test_sizes_and_times_are_readable():
    assert [shown_size(n) for n in (12, 2048, 3 * 2**20, 5 * 2**30)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [shown_time(s) for s in (3.4, 600, 36000)] == ["3 s", "10 min", "10.0 h"]


# -- memory ------------------------------------------------------------------------------------------------


def test_a_calibration_from_files_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    inside = calibrate(ToyPipeline(curved), computed_steps=5, memory_limit=TRAJECTORIES)
    assert "trajectories: 18.8 KiB in memory (limit 18.8 KiB)" in capsys.readouterr().err
    outside = calibrate(ToyPipeline(curved), computed_steps=5, memory_limit=TRAJECTORIES - 1)
    assert f"18.8 KiB in files in {tmp_path}" in capsys.readouterr().err
    assert inside == outside
    assert list(tmp_path.iterdir()) == []


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


def test_the_flag_reaches_the_calibration(tmp_path, monkeypatch):
    argv = ["--model", "tiny", "--memory-limit-gib", "0.5", "--calibration-folder", str(tmp_path)]
    chosen = settings.parse(FOLDERS[0], argv, "test")
    given = {}
    monkeypatch.setattr(ertacache, "calibrate", lambda *_, **keywords: given.update(keywords))
    model = ModelFolder("made up", lambda _: {}, lambda *_: None)
    with pytest.raises(AttributeError):  # what stands for a calibration cannot be saved
        kept.obtain_calibration(None, chosen, model)
    assert given["memory_limit"] == 2**29


def test_the_flag_reaches_the_calibrations_of_a_comparison(monkeypatch):
    chosen = settings.parse(FOLDERS[0], ["--model", "tiny", "--memory-limit-gib", "0.5"], "test")
    given = []
    monkeypatch.setattr(ertacache, "calibrate", lambda *_, **keywords: given.append(keywords) or SimpleNamespace())
    monkeypatch.setattr(study, "recorded_runs", lambda *_, **keywords: given.append(keywords))
    monkeypatch.setattr(study, "kept_calibration", lambda *_: None)
    ledger = SimpleNamespace(get=lambda _, make: make())
    made = SimpleNamespace(
        pipe=None,
        chosen=chosen,
        model=ModelFolder("made up", lambda _: {}, lambda *_: None),
        calibration_prompts=["a"],
        arguments={},
        ledger=ledger,
        _asking=lambda *asked: study.Study._asking(made, *asked),
    )
    with pytest.raises(AttributeError):  # what stands for a calibration cannot be kept
        study.Study.calibration(made, "ertacache", 3)
    study.Study._recorded(made)
    assert [keywords["memory_limit"] for keywords in given] == [2**29, 2**29]
