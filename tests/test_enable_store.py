"""Stored calibrations: the commands that look after them, and bundles of several."""

import json

import enable as bench_enable
import pytest
import torch
from record import read
from test_enable import SAMPLES, STEPS, Late, call, enable, evaluations, only_file
from tiny_pipelines import tiny_module
from toys import ToyPipeline, curved

import ertacache
from ertacache import Bundle, Calibration, MismatchError, hub
from ertacache.auto.store import HOME, Store, default_folder
from ertacache.cli import inspect
from ertacache.fit.runs import TRIED_STEPS

pytestmark = pytest.mark.core


def run(*argv) -> int:
    return inspect.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store with two calibrations: of 10 and of 6 steps."""
    folder = tmp_path_factory.mktemp("store")
    pipe = ToyPipeline(curved)
    enable(pipe, folder)
    for steps in (STEPS, 6):
        for seed in range(SAMPLES):
            call(pipe, seed, steps)
    return folder


def test_list_show_and_remove(filled, tmp_path, capsys):
    for path in filled.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run("list", "--store", tmp_path) == 0
    said = capsys.readouterr().out
    assert "5 of 10" in said and "3 of 6" in said
    assert run("show", "--store", tmp_path, "n6") == 0
    assert "3 of 6 steps computed" in capsys.readouterr().out
    assert run("remove", "--store", tmp_path, "toy") == 2, "two have that in their names"
    assert run("remove", "--store", tmp_path, "n10") == 0
    assert only_file(tmp_path).num_inference_steps == 6
    assert run("show", "--store", tmp_path, "n10") == 2


def test_what_is_exported_works_where_it_is_imported(filled, tmp_path):
    file, other = tmp_path / "all.json", tmp_path / "other"
    assert run("export", "--store", filled, file) == 0 and run("import", "--store", other, file) == 0
    assert sorted(p.name for p in other.glob("*")) == sorted(p.name for p in filled.glob("*.json"))
    pipe = ToyPipeline(curved)
    enable(pipe, other)
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    with ertacache.apply(pipe, file):
        assert evaluations(pipe, lambda: call(pipe, 9, 6)) == 3


def test_a_file_of_calibrate_is_found_by_what_it_holds(tmp_path):
    asked = {"computed_steps": 5, "effort": "best", "num_inference_steps": STEPS, "progress": False}
    made = ertacache.calibrate(ToyPipeline(curved), list("abcd"), seeds=range(4), **asked)
    made.save(tmp_path / "mine.json")
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2 and enabled.status()[0].calibration == made
    pipe.guidance_scale = 1.5  # guided, and the file is not
    assert evaluations(pipe, lambda: call(pipe, 9)) == 2 * STEPS


def test_what_is_pushed_can_be_pulled(filled, tmp_path, monkeypatch):
    there = {}
    monkeypatch.setattr(hub, "push", lambda bundle, *where: str(there.setdefault(where, bundle.save(tmp_path / "f"))))
    monkeypatch.setattr(hub, "fetch", lambda *where: there[where])
    assert run("push", "--store", filled, "me/mine", "flux.json") == 0
    assert run("pull", "--store", tmp_path / "other", "me/mine", "flux.json") == 0
    assert Store(tmp_path / "other").names() == Store(filled).names()


def test_run_sh_calibrates_itself(tmp_path, monkeypatch, capsys):
    flux = tiny_module("flux")
    argv = ["--model", "tiny", "--method", "auto", "--num-inference-steps", "3", "--out", str(tmp_path / "out")]
    argv += ["--computed-steps", "2", "--calibration-folder", str(tmp_path / "store")]
    reports = []
    for _ in range(2):
        flux.main(argv)
        reports.append(json.loads((tmp_path / "out" / "run.json").read_text()))
    first, second = reports
    assert first["calibration_sha256"] is None and first["computed_steps"] is None, "four prompts: all were watched"
    assert second["computed_steps"] == only_file(tmp_path / "store").computed_steps


def test_nothing_is_exported_from_nothing(tmp_path, capsys):
    assert run("list", "--store", tmp_path) == 0 and run("export", "--store", tmp_path, tmp_path / "all.json") == 1
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_one_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(HOME, str(tmp_path / "there"))
    assert default_folder() == Store().folder == tmp_path / "there"
    monkeypatch.delenv(HOME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder().name == "ertacache"


# -- bundles -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle():
    pipe, speedups = ToyPipeline(curved), [2, 5]
    made = ertacache.calibrate(
        pipe, list("abcd"), seeds=range(4), speedup=speedups, num_inference_steps=[10, 6], effort="fast", progress=False
    )
    recorded, fitted = 10 + 6, 5 + 2 + 3 + 1  # in batches of four
    tried = 2 * TRIED_STEPS  # the first prompt and the last, once more
    assert pipe.transformer.calls == recorded + fitted + 2 * tried  # for each number of steps
    return made


def test_lists_make_a_bundle_from_one_recording_for_each_number_of_steps(bundle, tmp_path):
    assert [(c.num_inference_steps, len(c.computed_steps)) for c in bundle] == [(10, 5), (10, 2), (6, 3), (6, 1)]
    alone = {"speedup": 5, "num_inference_steps": 10, "effort": "fast", "progress": False}
    assert bundle[1] == ertacache.calibrate(ToyPipeline(curved), list("abcd"), seeds=range(4), **alone)
    assert Bundle.load(bundle.save(tmp_path / "b.json")) == bundle


def test_a_bundle_is_inspected_and_is_no_calibration(bundle, tmp_path, capsys):
    path = bundle.save(tmp_path / "b.json")
    assert run("inspect", path) == run("validate", path) == 0
    assert capsys.readouterr().out.count("steps computed") == len(bundle)
    with pytest.raises(ertacache.CalibrationError, match="bundle"):
        Calibration.load(path)


def test_a_run_takes_the_calibration_that_fits_it(bundle):
    pipe = ToyPipeline(curved)
    with ertacache.apply(pipe, bundle) as applied:
        assert [evaluations(pipe, lambda s=s: call(pipe, 9, s)) for s in (6, 10)] == [3, 5]
        with pytest.raises(MismatchError, match="grid of 8"):
            call(pipe, 9, 8)
        assert applied.reused_calls == 8
    with ertacache.apply(pipe, bundle, speedup=5):
        assert [evaluations(pipe, lambda s=s: call(pipe, 9, s)) for s in (6, 10)] == [1, 2]
        cached = call(pipe, 9)
    with ertacache.apply(pipe, bundle[1]):
        assert torch.equal(call(pipe, 9), cached)


def test_the_page_says_what_was_measured():
    bench_enable.fill(bench_enable.PAGE, bench_enable.table(read("enable_*")), bench_enable.MARKER, check=True)


@pytest.mark.parametrize(
    ("name", "steps", "latents", "outputs"),
    # bytes of a tensor: 64 x 64 tokens of 64 channels; 16 channels, 21 frames of 60 x 104
    [("FLUX.1-dev", 28, 64 * 64 * 64 * 2, 64 * 64 * 64 * 2), ("Wan2.1-1.3B", 50, 2096640 * 4, 2096640 * 2)],
)
def test_the_memory_on_the_page_is_that_of_the_tensors(name, steps, latents, outputs):
    one = ((steps + 1) * latents + steps * outputs) / 2**20
    [row] = [row for row in bench_enable.PAGE.read_text().splitlines() if row.startswith(f"| {name}")]
    four = f"{4 * one:.0f} MiB" if 4 * one < 1024 else f"{4 * one / 1024:.1f} GiB"
    assert [cell.strip() for cell in row.split("|")[2:4]] == [f"{one:.3g} MiB", four], (one, four)


def test_runs_from_the_middle_take_the_calibration_for_their_first_step():
    asked = {"seeds": range(4), "num_inference_steps": STEPS, "effort": "fast", "progress": False}
    parts = [ertacache.calibrate(Late(curved), list("abcd"), speedup=2, first=first, **asked) for first in (0, 4)]
    pipe = Late(curved)
    with ertacache.apply(pipe, Bundle(parts)):
        found = [call(pipe, 9, first=first) for first in (4, 0, 4)]
        assert [evaluations(pipe, lambda f=first: call(pipe, 9, first=f)) for first in (0, 4)] == [5, 3]
        with pytest.raises(ertacache.StateError, match="starts at step 2"):
            call(pipe, 9, first=2)
    for part, first, result in ((parts[1], 4, found[0]), (parts[0], 0, found[1]), (parts[1], 4, found[2])):
        with ertacache.apply(pipe, part):
            assert torch.equal(call(pipe, 9, first=first), result)


@pytest.mark.parametrize("damage", [[], {}, "x", [{"schema": 1}]])
def test_a_damaged_bundle_is_refused(damage, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"schema": 1, "bundle": damage}))
    with pytest.raises(ertacache.CalibrationError, match=r"b\.json"):
        Bundle.load(path)
    with pytest.raises(ertacache.CalibrationError):
        Calibration.load(path)
