"""The benches: arithmetic by hand, their pieces on tiny pipelines, and the page that is made from their results."""

import contextlib
import copy
import json
import random
import tempfile
import time

import fuzz_calibration
import held_memory
import latency
import numpy as np
import page_parts
import pytest
import real_architecture
import real_models
import record
import scaling
import speed_page
import speed_targets
import subjects
import tiny_pipelines
import torch
from held_memory import compare_memory, held_bytes
from pipelines import KINDS, made
from step_timer import Marks, Timings, clock_of, compare
from test_attach import run
from toys import ToyPipeline, curved

import ertacache
from ertacache.attach import attached
from ertacache.cache import Row, combine
from ertacache.fit.record import Recording, gram_matrix
from ertacache.fit.schedule import path_schedule
from ertacache.fit.step_by_step import OUTPUTS

CPU = torch.device("cpu")


# -- times -------------------------------------------------------------------------------------------------


def timings(steps, transformer):
    return Timings(steps, transformer, [0.25] * len(steps))


def test_times_by_hand():
    """Two of four steps, each computed one a second, each reused one a quarter."""
    uncached = [timings([1.0] * 4, [0.5] * 4)]
    cached = [timings([1.0, 0.25, 1.0, 0.25], [0.5, 0.0, 0.5, 0.0])]
    row = compare(uncached, cached, [0, 2])
    assert (row["uncached_seconds"], row["cached_seconds"]) == (4.0, 2.5)
    assert (row["speedup"], row["ideal_speedup"], row["realised_over_ideal"]) == (1.6, 2.0, 0.8)
    assert row["reused_percent_of_computed"] == 25.0
    assert (row["transformer_percent"], row["scheduler_percent"], row["pipeline_percent"]) == (50.0, 25.0, 25.0)
    assert (row["reused_scheduler_and_cache_seconds"], row["reused_pipeline_seconds"]) == (0.25, 0.0)


def test_a_step_takes_the_least_of_its_repeats():
    """What disturbs one step of one run is not in the result."""
    quiet, disturbed = timings([1.0] * 4, [0.5] * 4), timings([1.0, 9.0, 1.0, 1.0], [0.5] * 4)
    assert compare([disturbed, quiet], [quiet], [0, 2]) == {**compare([quiet], [quiet], [0, 2])}
    assert compare([disturbed], [quiet], [0, 2])["uncached_seconds"] == 12.0


@pytest.mark.parametrize(("threads", "clock"), [(1, "processor"), (2, "wall")])
def test_one_thread_is_timed_by_what_it_works(threads, clock, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    result = {"model": "x", "clock": clock_of(CPU), **record.machine(CPU, torch.float32)}
    assert result["clock"] == clock and ("processor time" in page_parts.ran_on(result)) == (threads == 1)
    marks = Marks(CPU)
    before = marks.now()
    time.sleep(0.2)
    assert (marks.seconds(before, marks.now()) >= 0.2) == (threads == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_timed_and_nothing_stays_attached(kind):
    pipe, call, calibration, _ = made(kind)
    before = call()[0]
    row = latency.measure(pipe, call, calibration, repeats=1, device=CPU)
    assert row["num_inference_steps"] == 8 and row["computed_steps"] == calibration.computed_steps
    assert row["reused_step_seconds"] > 0 and 0 < row["transformer_percent"] <= 100
    assert torch.equal(call()[0], before)
    assert "step" not in vars(pipe.scheduler) and "forward" not in vars(pipe.transformer)


def test_results_say_which_commit_made_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert record.commit() == "unknown"
    monkeypatch.undo()
    result = {"model": "x", **record.machine(CPU, torch.float32)}
    assert page_parts.ran_on(result).endswith(f", commit {result['commit']}")


# -- architectures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"), [("flux", 11.9), ("flux-schnell", 11.9), ("wan", 1.42), ("cogvideox", 1.69)]
)
def test_architectures_have_their_real_size(name, billions):
    """Parameter counts of the published checkpoints; nothing is allocated."""
    model = real_models.MODELS[name]
    pipe = model.build(real_architecture.Request(device=torch.device("meta")), model.size)
    assert sum(p.numel() for p in pipe.transformer.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_architectures_are_cut_down_by_fractions():
    model = real_models.MODELS["wan"]
    request = real_architecture.Request(layers=0.1, scale=0.25, frames=5, device=torch.device("meta"))
    assert model.sized(request) == {"height": 128, "width": 208, "num_frames": 5}
    assert len(model.build(request, model.sized(request)).transformer.blocks) == 3
    assert real_architecture.kept(19, 0.01) == 1
    with pytest.raises(ValueError, match="fraction is 0"):
        real_architecture.kept(19, 0)


def test_schnell_is_distilled():
    model = real_models.MODELS["flux-schnell"]
    pipe = model.build(real_architecture.Request(layers=0.01, device=torch.device("meta")), model.size)
    assert model.steps == (4, 8) and not pipe.transformer.config.guidance_embeds
    assert pipe.scheduler.config.shift == 1 and not pipe.scheduler.config.use_dynamic_shifting


SMALL = ["--layers", "0.034", "--scale", "0.07", "--frames", "5", "--repeats", "1"]


def test_a_reduced_model_is_measured_and_saved_after_every_row(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(latency, "write", lambda name, record, _: saved.append((name, copy.deepcopy(record))))
    latency.main(["wan", *SMALL, "--steps", "2", "--computed", "1", "2", "--out", str(tmp_path)])
    assert [name for name, _ in saved] == ["latency_wan_cpu_reduced"] * 2
    assert [len(result["rows"]) for _, result in saved] == [1, 2]
    result = saved[-1][1]
    assert result["layers_fraction"] == 0.034 and not result["full_size"] and result["commit"]
    assert result["rows"][0]["computed_steps"] == [0] and result["size"]["num_frames"] == 5


@pytest.mark.parametrize("name", list(real_models.MODELS))
def test_a_cpu_is_given_less_where_nothing_is_said(name, capsys, monkeypatch):
    built = []

    class Stop(Exception):
        pass

    def build(self, request):
        built.append(request)
        raise Stop

    monkeypatch.setattr(real_architecture.RealModel, "pipeline", build)
    with pytest.raises(Stop):
        subjects.real_subject(name, real_architecture.Request(None, None), None, None)
    assert built[0].layers < 0.05 and built[0].scale <= 0.25 and "on a CPU reduced to" in capsys.readouterr().err
    with pytest.raises(Stop):
        subjects.real_subject(name, real_architecture.Request(1.0, None), None, None)
    assert (built[1].layers, built[1].scale) == (1, 1) and not capsys.readouterr().err


def test_the_tiny_pipeline_is_measured_with_the_calibrations_that_lie_there():
    subject = subjects.tiny_subject("flux", None)
    before = sorted((tiny_pipelines.FOLDERS["flux"] / "calibration").iterdir())
    counts = subject.counts(28)
    assert len(counts) >= 1 and counts == sorted(counts, reverse=True)
    call = subjects.caller(subject.pipe, subject.arguments, 28)
    assert [len(subject.calibration(call, 28, count).computed_steps) for count in counts] == counts
    assert sorted((tiny_pipelines.FOLDERS["flux"] / "calibration").iterdir()) == before
    assert subject.name == "flux_tiny" and subjects.tiny_subject("flux-schnell", None) is None


def failing(*_, **__):
    raise RuntimeError("no memory\nat all")


def test_what_fails_is_an_entry_and_the_rest_is_kept(tmp_path, monkeypatch):
    error = {"error": "RuntimeError: no memory"}
    monkeypatch.setattr(held_memory, "compare_memory", failing)
    latency.main(
        ["wan", *SMALL, "--steps", "2", "--computed", "1", "--memory", "--out", str(tmp_path)],
    )
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 1 and result["seconds"] > 0
    assert result["memory"] == [{"method": "all", **error}]
    assert speed_page.memory([result]).count("RuntimeError: no memory") == 1


def test_a_cache_that_fails_does_not_hide_the_others(monkeypatch):
    pipe, call, calibration, output_bytes = made("flux")
    caches = held_memory._caches(pipe, calibration)[:2]
    monkeypatch.setattr(held_memory, "_caches", lambda *_: [("broken", Broken), *caches])
    found = compare_memory(pipe, call, calibration, output_bytes, CPU)
    assert found[1] == {"method": "broken", "error": "RuntimeError: no memory"}
    assert [entry["method"] for entry in found] == ["none", "broken", "ertacache", "taylorseer-lite"]


class Broken(contextlib.nullcontext):
    def __enter__(self):
        failing()


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        *((kind, True) for kind in KINDS),
        *((kind, False) for kind in ("wan", "cogvideox")),
        ("opensora", False),  # a view that would keep the variance channels' memory too
    ],
)
def test_the_cache_holds_the_outputs_that_it_combines_and_no_more(kind, guidance):
    pipe, call, calibration, output_bytes = made(kind, computed_steps=7, guidance=guidance)
    assert max(map(len, calibration.coefficients)) == OUTPUTS
    call()
    plain = held_bytes(call, CPU)
    with ertacache.apply(pipe, calibration):
        beyond = held_bytes(call, CPU) - plain
    assert (OUTPUTS - 1) * output_bytes < beyond <= OUTPUTS * output_bytes + 256, f"{beyond / output_bytes:.2f} outputs"


def test_the_sum_of_a_reused_step_leaves_no_copies():
    outputs = [torch.randn(2, 1000).to(torch.bfloat16) for _ in range(4)]
    before = [output.clone() for output in outputs]
    total = combine(outputs, Row([1.5, -0.7, 0.3, -0.1]), outputs[0])
    assert total.dtype == torch.bfloat16 and all(map(torch.equal, outputs, before))
    expected = 1.5 * outputs[0].float() - 0.7 * outputs[1].float() + 0.3 * outputs[2].float() - 0.1 * outputs[3].float()
    assert torch.allclose(total.float(), expected, atol=0.05)


def test_what_other_caches_hold_is_measured():
    pipe, call, calibration, output_bytes = made("flux")
    found = {entry["method"]: entry for entry in compare_memory(pipe, call, calibration, output_bytes, CPU)}
    ours = found["ertacache"]
    assert ours["beyond_uncached_bytes"] == pytest.approx(ours["beyond_uncached_outputs"] * output_bytes)
    # beside what it holds there is a moment for samples of the weights, that do not grow with the model
    assert 0 < ours["peak_beyond_uncached_bytes"] <= ours["beyond_uncached_bytes"] + 2**16
    assert found["taylorseer"]["beyond_uncached_bytes"] > found["ertacache"]["beyond_uncached_bytes"]


# -- calibration -------------------------------------------------------------------------------------------


def recorded(**limit) -> Recording:
    pipe, recording = ToyPipeline(curved), Recording(**limit)
    with attached(pipe, recording.begin, stepped=recording.stepped):
        run(pipe)
    return recording


def test_profiling_goes_to_files_above_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inside, outside = recorded(), recorded(memory_limit=1000)
    assert inside.store._files is None and outside.store._files is not None
    assert outside.store.planned == 17 * 2 * 3 * 4 * 4 * 4  # 2 N + 1 tensors (2, 3, 4, 4) of float32
    assert len(list(tmp_path.glob("*/*.bin"))) == 17
    for one, other in zip(inside.latents + inside.outputs, outside.latents + outside.outputs, strict=True):
        assert torch.equal(one, other)
    del outside
    assert list(tmp_path.iterdir()) == []


def test_gram_matrix_in_pieces_is_the_whole(monkeypatch):
    outputs = [torch.randn(3, 50) for _ in range(6)]
    whole = np.stack([o.double().flatten().numpy() for o in outputs])
    monkeypatch.setattr("ertacache.fit.record.GRAM_VALUES", 6 * 7)
    assert np.allclose(gram_matrix(outputs), whole @ whole.T / 150)


def test_growth_is_the_exponent():
    numbers = [10, 20, 50, 100, 200]
    assert scaling.growth(numbers, [1e-6 * n**2 for n in numbers]) == pytest.approx(2.0)


def test_scaling_times_the_search_that_calibrations_make(monkeypatch):
    asked = []
    monkeypatch.setattr(scaling, "path_schedule", lambda *given: asked.append(given[2:]) or path_schedule(*given))
    found = scaling.stages(6, prompts=1, frames=1, side=4)
    assert set(found) == set(scaling.STAGES) and min(found.values()) >= 0
    assert asked == [(3, OUTPUTS)] * scaling.REPEATS


def test_the_fuzzer_does_not_change_what_it_mutates_with():
    rng, before = random.Random(0), copy.deepcopy(fuzz_calibration.VALUES)
    for _ in range(3000):
        fuzz_calibration.mutated_json(b'{"a": [[], {"b": [1, 2]}], "c": {}}', rng)
    assert before == fuzz_calibration.VALUES


# -- the page ----------------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured():
    assert speed_page.main(["--check"]) == 0, "run: python bench/speed_page.py"


def test_the_page_is_made_from_results(tmp_path):
    pipe, call, calibration, output_bytes = made("flux")
    result = {
        "model": "made up",
        "weights": "random",
        "branches": 1,
        "layers_fraction": 0.5,
        "scale": 1.0,
        "full_size": False,
        "size": {"height": 16, "width": 32},
        "parameters": 3_000_000,
        "rows": [latency.measure(pipe, call, calibration, 1, CPU)],
        "memory": compare_memory(pipe, call, calibration, output_bytes, CPU),
        **record.machine(CPU, torch.float32),
    }
    (tmp_path / "latency_flux_cpu.json").write_text(json.dumps(result))
    text = "\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in [*speed_page.SECTIONS, "commands"])
    page = speed_page.filled(text, tmp_path)
    assert "made up" in page and "0.5 of the blocks" in page and "taylorseer-lite" in page
    assert page.count("ot measured") > text.count("ot measured"), "what there is no result of is said"
    assert speed_page.filled(page, tmp_path) == page
    with pytest.raises(ValueError, match="targets:begin"):
        speed_page.filled("no markers", tmp_path)


def on_gpu(realised: float, reused: float = 0.3, **more) -> dict:
    row = {
        "computed_steps": [0],
        "num_inference_steps": 2,
        "realised_over_ideal": realised,
        "reused_percent_of_computed": reused,
    }
    return {"model": "M", "weights": "random", "full_size": True, "device_kind": "cuda", "rows": [row], **more}


def test_targets_are_met_missed_or_not_measured():
    def statuses(*results):
        lines = speed_targets.targets(results).splitlines()[2:]
        return [line.split(" | ")[1].strip(" |") for line in lines]

    assert statuses() == ["not measured"] * len(speed_targets.TARGETS)
    held = {"memory": [{"method": "none"}, {"method": "ertacache", "beyond_uncached_outputs": 6.04}], "branches": 2}
    good = on_gpu(0.985, host_syncs_bfloat16={"by_the_cache": 0}, **held)
    where = "(M, 1 of 2 steps)"
    assert statuses(good) == [f"met: 0.985 {where}", "not measured", f"met: 0.3 {where}", "met: 3 (M)", "met: 0 (M)"]
    # the worst of all results counts
    assert statuses(good, on_gpu(0.97, 0.6))[0] == f"**missed**: 0.97 {where}"
    assert statuses(good, on_gpu(0.97, 0.6))[2] == f"**missed**: 0.6 {where}"
    tiny = {**on_gpu(0.94), "weights": "trained", "full_size": False, "device_kind": "cpu"}
    assert statuses(tiny)[:3] == ["not measured", f"**missed**: 0.94 {where}", "not measured"]
    reduced = {**on_gpu(0.9), "full_size": False}
    assert statuses(reduced) == ["not measured"] * len(speed_targets.TARGETS)


def test_commands_say_how_long_they_took(tmp_path):
    result = {"device_kind": "cpu", "threads": 2}
    for name, seconds in (("flux", 20.0), ("wan", 400.0)):
        (tmp_path / f"few_steps_{name}.json").write_text(json.dumps({**result, "seconds": seconds}))
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "run.json").write_text(json.dumps({"seconds": 502.4}))
    (tmp_path / "fuzz_kill.json").write_text(json.dumps({"seconds": 25.6}))  # it does not say on what
    (tmp_path / "scaling.json").write_text(json.dumps({**result, "seconds": 30, "threads": 1}))
    table = speed_targets.commands(tmp_path)
    assert "| `python bench/few_steps.py` | `bench/results/few_steps_MODEL.json` | 7 min, 2 threads |" in table
    assert "| `python bench/fuzz_kill.py` | `bench/results/fuzz_kill.json` | 26 s |" in table
    assert "| `python bench/scaling.py` | `bench/results/scaling.json` | 30 s, 1 thread |" in table
    assert "| `sh bench/gpu.sh` | `bench/results/gpu/run.json` | 8 min |" in table
    assert table.count("not measured") == len(speed_targets.COMMANDS) - 4


@pytest.mark.parametrize(("cores", "said"), [({0}, "(1 core)"), ({0, 1}, "(2 cores)")])
def test_a_processor_is_named_with_its_cores(monkeypatch, cores, said):
    monkeypatch.setattr(record.os, "sched_getaffinity", lambda _: cores, raising=False)
    assert record.device_name(torch.device("cpu")).endswith(said)
