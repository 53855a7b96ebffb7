"""Say what ERTACache would do with a pipeline: what it attaches to, and what a call of it is made of."""

from contextlib import suppress
from typing import Any

import torch
from tqdm import tqdm

from ertacache.api import check_parts_of
from ertacache.attach import networks_of, schedulers_of
from ertacache.checks import check_no_other_cache
from ertacache.errors import ERTACacheError
from ertacache.fit.record import Recording
from ertacache.fit.runs import MICRO_BATCH, TRIED_STEPS, Runs, TriedError, quiet
from ertacache.fit.work import counted, size_of
from ertacache.intercept import attachment_of


def explain(pipe: Any, prompt: str | None = None, **arguments: Any) -> str:
    """Describe a call of a pipeline in a few lines, from its first two steps, which are all that runs.

    Says what would be attached, the noise grid, how many guidance branches there are, what runs at every step, and
    whether the call can be calibrated. The pipeline is as before afterwards.

    Args:
        prompt: of the call; None where it takes none.
        arguments: others of the call.
    """
    lines = [f"pipeline   {type(pipe).__name__}"]
    try:
        check_parts_of(pipe)
        check_no_other_cache(pipe)
        if attachment_of(pipe) is not None:
            lines.append("attached   a calibration is applied: ertacache.remove(pipe) to calibrate another")
            return "\n".join(lines)
        networks = [f"{name} ({type(part).__name__}, {_count(part)})" for name, part in networks_of(pipe).items()]
        lines.append(f"attaches   {', '.join(networks)}: all rest on reused steps")
        lines.append(f"and to     {', '.join(type(scheduler).__name__ for scheduler in schedulers_of(pipe))}")
        lines += _run(pipe, prompt, arguments)
        lines.append("calibrate  it can be: ertacache.calibrate(pipe, prompts, ...) with these arguments")
    except ERTACacheError as error:
        lines.append(f"calibrate  it cannot be: {error}")
    except Exception as error:
        lines.append(f"the call   fails without ERTACache, too: {type(error).__name__}: {error}")
    return "\n".join(lines)


def _run(pipe: Any, prompt: str | None, arguments: dict[str, Any]) -> list[str]:
    """What the first steps of a call tell."""
    recording = Recording()
    bar = tqdm(disable=True)
    runs = Runs(pipe, [prompt], [0], arguments, MICRO_BATCH, bar, record=None, alone=True)  # type: ignore

    def keep(step: int, latents: torch.Tensor, stream: int) -> None:
        recording.stepped(step, latents, stream)
        if step + 1 >= TRIED_STEPS and stream == len(recording.streams):
            raise TriedError

    with quiet(pipe), torch.no_grad(), counted(pipe) as work, suppress(TriedError):
        runs._results(recording, keep, "pt", started=recording.started, guided=recording.guided)
    steps, first, times = len(recording.timesteps), recording.first, recording.timesteps
    whole = f"{steps - first} steps, timesteps {times[first]:g} to {times[-1]:g}"
    branches = [recording.branches.get(step, 0.0) for step in range(len(recording.outputs))]
    streams = [recording, *(stream for stream in recording.streams if isinstance(stream, Recording))]
    shapes = [stream.latents[0].shape[1:] for stream in streams]
    found = [
        f"grid       {whole}" + (f", from step {first} of {steps} on" if first else ""),
        f"latents    {' and '.join(str(list(shape)) for shape in shapes)}",
        f"guidance   the transformer sees {max(branches):g} samples for each result"
        + (" (no guidance, or a distilled one)" if max(branches) == 1 else ""),
        f"each step  moves all elements alike: {'yes' if recording.uniform else 'no, they are fitted one by one'}",
    ]
    total = sum(work.values()) + size_of(pipe.transformer) * sum(branches[1:])
    others = [f"{name} ({value / total:.0%} of the work)" for name, value in work.items() if value > 1e-3 * total]
    return [*found, f"every step {', '.join(others) or 'nothing else'} runs beside them, reused or not"]


def _count(network: Any) -> str:
    size = size_of(network)
    return f"{size / 1e9:.1f} B parameters" if size >= 1e8 else f"{size / 1e6:.2g} M parameters"
