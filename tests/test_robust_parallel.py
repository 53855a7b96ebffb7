"""Several processes: prompts shared out by accelerate, and one sample shared out by diffusers' context parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import tiny_models
import torch

import ertacache

HERE = Path(__file__).parent


def launch(job: str, name: str, folder: Path, module: str = "torch.distributed.run") -> None:
    """Two processes on the CPU, talking through gloo."""
    flags = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--master-port", "0", "--standalone"],
        "accelerate.commands.launch": [
            *("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", "0"),
        ],
    }[module]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'common'}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *flags, HERE / "parallel_worker.py", job, name, folder],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("name", "module"), [("wan", "torch.distributed.run"), ("flux", "accelerate.commands.launch")])
def test_prompts_shared_out_are_what_one_process_makes(name, module, tmp_path):
    launch("data_parallel", name, tmp_path, module)
    pipe = tiny_models.make(name)
    with ertacache.apply(pipe, tiny_models.fitted(name)):
        expected = [tiny_models.call(pipe, name, prompts=(prompt,)) for prompt in parallel_worker.PROMPTS]
    made = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):  # the workers have one thread, which sums in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_one_sample_on_two_devices(name, tmp_path):
    """CogVideoX and Open-Sora have no plan for it in diffusers."""
    launch("context_parallel", name, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1)]
    plain, cached = ranks[0]["alone"]
    for rank in ranks:
        for index, (result, computed, reused) in enumerate(rank["shared"]):
            torch.testing.assert_close(result, plain if index % 2 else cached, rtol=1e-3, atol=1e-3)
            if index % 2 == 0:
                assert computed == reused > 0
    for one, other in zip(ranks[0]["shared"], ranks[1]["shared"], strict=True):
        assert one[1:] == other[1:] and torch.equal(one[0], other[0])
