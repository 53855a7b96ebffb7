"""Several processes: prompts shared out by accelerate, and one sample shared out by diffusers' context parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import parallel_worker
import pytest
import test_reproduce
import tiny_models
import torch

import ertacache
from compare import processes, reproduce
from compare.comparison import _joined
from compare.ledger import Ledger
from ertacache.cli import models
from ertacache.cli.folder import ModelFolder

HERE = Path(__file__).parent


def launch(*command: str | Path, module: str = "torch.distributed.run") -> subprocess.CompletedProcess[str]:
    """A script with its arguments in two processes on the CPU, talking through gloo."""
    flags = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--master-port", "0", "--standalone"],
        "accelerate.commands.launch": [
            *("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", "0"),
        ],
    }[module]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'common'}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *flags, *command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of what two processes made; starting them takes longer than their work."""
    folder = tmp_path_factory.mktemp("parallel")
    # context parallelism of CogVideoX and Open-Sora has no plan in diffusers
    jobs = [f"{how}_parallel:{name}" for how in ("data", "context") for name in ("wan", "flux")]
    launch(HERE / "parallel_worker.py", folder, *jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_prompts_shared_out_are_what_one_process_makes(name, made):
    pipe = tiny_models.make(name)
    with ertacache.apply(pipe, tiny_models.fitted(name)):
        expected = [tiny_models.call(pipe, name, prompts=(prompt,)) for prompt in parallel_worker.PROMPTS]
    shared = torch.load(made / f"{name}.pt", weights_only=True)
    assert len(shared) == len(expected)
    for one, other in zip(shared, expected, strict=True):  # the workers have one thread, which sums in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_one_sample_on_two_devices(name, made):
    ranks = [torch.load(made / f"{name}-rank{i}.pt", weights_only=True) for i in (0, 1)]
    plain, cached = ranks[0]["alone"]
    for rank in ranks:
        for index, (result, computed, reused) in enumerate(rank["shared"]):
            torch.testing.assert_close(result, plain if index % 2 else cached, rtol=1e-3, atol=1e-3)
            if index % 2 == 0:
                assert computed == reused > 0
    for one, other in zip(ranks[0]["shared"], ranks[1]["shared"], strict=True):
        assert one[1:] == other[1:] and torch.equal(one[0], other[0])


# -- a comparison ------------------------------------------------------------------------------------------


def reproduced(out: Path) -> list[dict]:
    """results.json of one process at the settings below, without the times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launchers set it: more of them sum in another order
    try:
        pipe = test_reproduce.FluxPipeline.from_pretrained(test_reproduce.FOLDER / "tiny", dtype=torch.float32)
        model = ModelFolder("FLUX", test_reproduce.arguments, test_reproduce.save)
        reproduce.main(test_reproduce.FOLDER, lambda _: pipe, model, comparison_flags(out))
    finally:
        torch.set_num_threads(before)
    return test_reproduce.rows(out)


def comparison_flags(out: Path) -> list[str]:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("a red circle\na large blue star at the top\ntwo green rings\na small yellow square\n")
    few = ["--num-inference-steps", "4", "--num-calibration-prompts", "2", "--seeds", "3", "--micro-batch", "1"]
    few += [
        "--height",
        "32",
        "--width",
        "32",
        "--effort",
        "balanced",
        "--methods",
        "ertacache,fewer-steps",
        "--computed-steps",
        "2",
    ]
    return ["--model", "tiny", "--dtype", "float32", *few, "--prompts", str(prompts), "--out", str(out)]


@pytest.mark.slow
def test_a_comparison_shared_out_ends_as_that_of_one_process(tmp_path):
    flags = comparison_flags(tmp_path / "two")
    done = launch(test_reproduce.FOLDER / "reproduce.py", *flags, module="accelerate.commands.launch")
    made, expected = test_reproduce.rows(tmp_path / "two"), reproduced(tmp_path / "one")
    assert made == expected and len(made) == 3 and made[0]["n"] == 4
    assert done.stdout.count("results.json") == 1  # the main process alone writes
    for folder in ("two", "one"):
        assert (tmp_path / folder / "report.html").stat().st_size > 10_000
    # by what they show: their names hold the calibration's digest, and with it the path that the model came from
    kept = [[np.load(p) for p in (tmp_path / f / ".progress").rglob("*.npy")] for f in ("two", "one")]
    two, one = (sorted(pictures, key=lambda array: array.tobytes()) for pictures in kept)
    assert len(two) == len(one) == 3
    assert all(np.array_equal(*pair) and len(pair[0]) == 4 for pair in zip(two, one, strict=True))


def test_of_several_processes_the_main_one_alone_keeps_a_ledger(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(processes, "agreed", lambda mine: (sent.append(mine), ["of the main one"])[1])
    assert Ledger(tmp_path, {}).get("x", lambda: pytest.fail("it was kept")) == "of the main one"
    answers = iter([[], "of the main one"])
    monkeypatch.setattr(processes, "agreed", lambda mine: (sent.append(mine), next(answers))[1])
    assert Ledger(tmp_path, {}).get("x", lambda: "mine") == "of the main one"
    answers = iter([[], "seconds"])
    assert Ledger(tmp_path, {}).get("x", lambda: pytest.fail("others wait"), alone=True) == "seconds"
    assert sent == [[], [], "mine", [], None] and list(tmp_path.iterdir()) == []


def test_metrics_of_shares_are_joined_in_order_and_a_share_may_be_empty():
    first, last = {"psnr": [1.0, 2.0], "lpips": None}, {"psnr": [3.0], "lpips": None}
    assert _joined([first, {}, last]) == {"psnr": [1.0, 2.0, 3.0], "lpips": None}
    assert _joined([]) == {}


def test_one_process_has_everything():
    assert (processes.count(), processes.is_main(), processes.agreed(3)) == (1, True, 3)
    assert processes.shared_out((1, 2)) == processes.gathered([1, 2]) == [1, 2]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_uses_the_processs_own_device(offload, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    used = []
    kept = {f"enable_{offload}_cpu_offload": lambda _, gpu_id: used.append(gpu_id)}
    models.place(type("Pipe", (), kept)(), type("Chosen", (), {"offload": offload})())
    assert used == [3]
