"""bench/gpu.sh: all parts cut down on a CPU, parts that go wrong, and what must be carried."""

import dataclasses
import functools
import importlib
import json
import subprocess
import time
import warnings
from pathlib import Path

import device_checks
import gpu
import gpu_page
import gpu_parts
import pytest
import real_models
import speed_page
import subjects
import torch
from pipelines import made

import ertacache

ROOT = Path(__file__).parents[1]
LIMITS = dict.fromkeys(("good", "hangs", "crashes", "fails", "lacks", "hopeless", "last"), 30.0)


# -- the command -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_runs_dry_and_the_page_shows_it(tmp_path, capsys):
    assert gpu.main(["--dry", "--out", str(tmp_path / "gpu")]) == 0
    said = capsys.readouterr().out
    assert all(f"{part}: done" in said for part in gpu.PARTS)
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "gpu").iterdir()}
    assert set(results) == {*gpu.PARTS, "run"} and len(results) <= 8, "a machine may give back eight files"
    run = results.pop("run")
    assert [part["part"] for part in run["parts"]] == list(gpu.PARTS) and run["dry"] and run["seconds"] < 540
    for name in ("flux", "wan", "cogvideox", "opensora"):
        checks = results[name]
        assert checks["all_computed_float32"] == {"equal": True, "uncached_recurs": True}
        assert checks["host_syncs_float32"]["by_the_cache"] == 0
    assert results["flux"]["graph_replay_float32"] == {"equal": True, "distance": 0.0}
    assert {row["variant"] for row in results["compiled"]["rows"]} == {"compiled, blocks", "compiled, whole"}
    assert results["compiled"]["compile_whole"]["graphs"] == 1
    assert results["compiled"]["compile_blocks"]["more_with_the_cache"] == 0
    rivals = {entry["method"]: entry for entry in results["rivals"]["rivals"]}
    assert rivals.pop("none")["computed_steps"] == 4
    assert {entry["computed_steps"] for entry in rivals.values() if "seconds" in entry} == {2}
    assert {"ertacache", "first-block-cache", "magcache", "taylorseer", "seacache"} <= set(rivals)
    for kind in ("model", "sequential"):
        found = results["offload"]["offload"][kind]
        assert [bool(count) for count in found["fetches"]] == [True, False, True, False]
        assert found["reused_steps_move_nothing"]
    assert results["offload"]["offload"]["sequential"]["bytes"][0] > 1e6
    for record in results.values():
        assert not record["full_size"] and record["device_kind"] == "cpu" and record["versions"]["torch"]
    for section in ("gpu", "gpu-checks", "gpu-rivals", "gpu-offload"):
        assert record["date"] in speed_page.section(section, tmp_path) or section == "gpu-checks"


def test_the_script_says_what_to_carry():
    done = subprocess.run(["sh", str(ROOT / "bench/gpu.sh"), "--needs"], capture_output=True, text=True, check=True)
    packages = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith("#")]
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert set(packages) <= set(lock), "of the versions that are locked"
    names = {package.split("==")[0] for package in packages}
    assert {"diffusers", "transformers", "huggingface-hub", "tokenizers"} <= names
    assert not {"torch", "sympy", "matplotlib"} & names
    assert gpu.version_here("no-such-package") == "missing" and gpu.closure(["no-such-package"]) == {"no-such-package"}


def test_the_checkout_travels():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    assert sum((ROOT / name).stat().st_size for name in listed.stdout.splitlines()) < 40 * 2**20


# -- parts that go wrong -----------------------------------------------------------------------------------


def run_parts(names: list[str], folder: Path, seconds: float = 60, **limits: float) -> dict[str, dict]:
    ended = gpu.run_all(names, folder, seconds, False, LIMITS | limits, module="gpu_stubs", least=0.5)
    written = json.loads((folder / "run.json").read_text())
    assert written["parts"] == ended and written["seconds"] > 0
    return {one["part"]: one for one in ended}


def test_a_part_that_goes_wrong_costs_no_other(tmp_path, capsys):
    began = time.monotonic()
    names = ["hangs", "crashes", "fails", "lacks", "good"]
    ended = run_parts(names, tmp_path, hangs=1.5)
    assert time.monotonic() - began < 20
    assert [ended[name]["status"] for name in names] == ["out of time", "failed", "failed", "lacks a package", "done"]
    assert ended["crashes"]["message"] == "exit code -6"
    assert ended["fails"]["message"] == "MemoryError: no memory left" and "what it said last" in ended["fails"]["tail"]
    assert "not_installed" in ended["lacks"]["message"]
    assert all((tmp_path / f"{name}.json").exists() for name in names)
    assert 0 < json.loads((tmp_path / "hangs.json").read_text())["left"] <= 1.5
    helper = Path("/proc") / (tmp_path / "helper").read_text() / "stat"
    assert not helper.exists() or ") Z " in helper.read_text(), "what the part started goes on"
    assert "fails: failed" in capsys.readouterr().out


def test_parts_are_skipped_when_the_time_is_over(tmp_path):
    began = time.monotonic()
    ended = run_parts(["hangs", "good"], tmp_path, seconds=2)
    assert time.monotonic() - began < 15
    assert (ended["hangs"]["status"], ended["good"]["status"]) == ("out of time", "skipped")


def test_without_a_device_the_first_part_says_so_for_all(tmp_path):
    ended = gpu.run_all(["hopeless", "good"], tmp_path, 60, False, LIMITS, module="gpu_stubs")
    assert [one["status"] for one in ended] == [gpu.NO_PART_CAN_RUN] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["hopeless.json"]
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--dry"):
            gpu_parts.run("flux", tmp_path, 0.0, False, print)


def test_every_part_has_a_function_and_they_fit_the_time_without_the_longest():
    assert all(callable(getattr(gpu_parts, name)) for name in gpu.PARTS)
    assert sum(gpu.PARTS.values()) - max(gpu.PARTS.values()) <= 9 * 60 - gpu.LAST


def test_what_cannot_be_measured_is_said_and_the_rest_of_the_part_goes_on(tmp_path, monkeypatch):
    def failing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_parts, "compare", failing)
    monkeypatch.setattr(gpu_parts, "all_computed", failing)
    with pytest.raises(RuntimeError, match=r"float32: OutOfMemoryError.*; all_computed_float32: OutOfMemoryError"):
        gpu_parts.run("opensora", tmp_path, time.monotonic() + 60, True, lambda _: None)
    record = json.loads((tmp_path / "opensora.json").read_text())
    assert "error" in record["all_computed_float32"] and record["host_syncs_float32"]["by_the_cache"] == 0


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox", "opensora"])
def test_the_models_run_in_the_dtype_that_a_device_gives_them(name):
    """The dry run has none of the halves."""
    model = real_models.MODELS[name]
    frames = 17 if "num_frames" in model.size else None
    cut = dataclasses.replace(gpu_parts.SMALLEST, frames=frames, dtype=model.dtype)
    subject = subjects.real_subject(name, cut, None, None)
    assert {part.dtype for part in subject.pipe.transformer.parameters()} == {model.dtype}
    assert subjects.caller(subject.pipe, subject.arguments, 1)()[0].isfinite().all()


# -- what is checked ---------------------------------------------------------------------------------------


def test_a_wrong_cache_is_not_called_equal(monkeypatch):
    pipe, call, calibration, _ = made("flux", computed_steps=8)
    assert device_checks.all_computed(pipe, call, gpu_parts.plain(calibration))["equal"]
    assert not device_checks.all_computed(pipe, call, calibration)["equal"]  # its outputs are combined


def test_a_graph_that_writes_over_its_output_is_survived_by_a_clone_alone(monkeypatch):
    pipe, call, calibration, _ = made("flux")
    assert device_checks.graph_replay(pipe, call, calibration, 0.0) == {"equal": True, "distance": 0.0}
    with ertacache.apply(pipe, calibration):
        assert not pipe.transformer.__dict__.get("forward")
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **_: self)
    assert not device_checks.graph_replay(pipe, call, calibration, 1e-3)["equal"]


def test_waiting_is_counted_by_who_waits(monkeypatch):
    """Warnings as torch gives them on a GPU; its announcement that the mode is a prototype is none of them."""
    pipe, call, calibration, _ = made("flux")
    step = type(pipe.scheduler).step
    library = importlib.import_module("ertacache.cache")

    @functools.wraps(step)
    def waiting(*args, **kwargs):
        gpu_warn(
            "Synchronization debug mode is a prototype feature and does not detect all synchronizing operations", ""
        )
        gpu_warn("called a synchronizing CUDA operation", "somewhere.py")
        gpu_warn("called a synchronizing CUDA operation", library.__file__)
        return step(*args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", waiting)
    found = device_checks.host_syncs(pipe, call, calibration)
    assert (found["uncached_loop"], found["cached_loop"], found["by_the_cache"]) == (16, 16, 8)
    assert "waits" in found["where_waiting_is_an_error"]


def gpu_warn(message: str, place: str) -> None:
    warnings.warn_explicit(message, UserWarning, place, 1)


def test_what_failed_is_on_the_page():
    error = {"error": "RuntimeError: no memory"}
    record = {"model": "M", "full_size": True, "size": {"height": 1, "width": 2}, "weights": "trained", "rows": []}
    record |= {"all_computed_float16": error, "offload": {"model": error}, "num_inference_steps": 4}
    record |= {
        "device_kind": "cuda",
        "threads": 1,
        "device": "D",
        "dtype": "float16",
        "versions": {"torch": 1, "diffusers": 1},
    }
    record["rivals"] = [{"method": "magcache", **error}]
    pages = gpu_page.checks([record]), gpu_page.offload([record]), gpu_page.rivals([record])
    assert all("no memory" in page for page in pages) and gpu_page.latency([record]) == ""
