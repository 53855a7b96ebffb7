"""What several processes do in test_robust_parallel.py: `torchrun parallel_worker.py FOLDER JOB:MODEL ...`."""

import sys
from pathlib import Path

import tiny_flux
import tiny_models
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

import ertacache

PROMPTS = ("a red cat runs", "a blue dog jumps", "a cat", "a dog runs and jumps", "a blue cat")
TEXT_TOKENS = 6  # a number that two processes can share


def data_parallel(name: str, folder: Path, state: PartialState) -> None:
    """Each process generates its share of the prompts; the first one keeps all of them in their order."""
    pipe = tiny_models.make(name)
    with ertacache.apply(pipe, tiny_models.fitted(name)), state.split_between_processes(list(PROMPTS)) as mine:
        made = [tiny_models.call(pipe, name, prompts=(prompt,)) for prompt in mine]
    gathered = gather_object(made)
    if state.is_main_process:
        torch.save(gathered, folder / f"{name}.pt")


def context_parallel(name: str, folder: Path, state: PartialState) -> None:
    """One sample whose tokens the processes share, attached before or after, against the same in each process alone."""
    from diffusers import ContextParallelConfig

    tiny_flux.TEXT_TOKENS = TEXT_TOKENS
    calibration = tiny_models.fitted(name)
    alone = tiny_models.expected(name)
    shared = []
    for attach_first in (True, False):
        pipe = tiny_models.make(name)
        config = ContextParallelConfig(ulysses_degree=state.num_processes)
        if attach_first:
            ertacache.apply(pipe, calibration)
        pipe.transformer.enable_parallelism(config=config)
        applied = ertacache.apply(pipe, calibration)
        shared.append((tiny_models.call(pipe, name), applied.computed_calls, applied.reused_calls))
        ertacache.remove(pipe)
        shared.append((tiny_models.call(pipe, name), 0, 0))
    torch.save({"alone": alone, "shared": shared}, folder / f"{name}-rank{state.process_index}.pt")


def on_cpu() -> None:
    """diffusers asks torch for its accelerator, and a machine without one has none to name."""
    if torch.accelerator.is_available():
        return
    torch._C._get_accelerator = lambda: torch.device("cpu")
    torch.accelerator.device_count = lambda: 1


if __name__ == "__main__":
    out, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    on_cpu()
    state = PartialState(cpu=True)
    for job, _, model in (text.partition(":") for text in jobs):
        {f.__name__: f for f in (data_parallel, context_parallel)}[job](model, Path(out), state)
    state.destroy_process_group()
