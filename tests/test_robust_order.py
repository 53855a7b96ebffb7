"""Attached before or after offloading and compilation, for every model: the same results, and all undone by removal."""

import contextlib
import warnings

import pytest
import tiny_models
import torch
from accelerate import hooks as accelerate_hooks
from diffusers.hooks import group_offloading
from tiny_models import NAMES, call, expected, fitted, make
from torch._dynamo.testing import CompileCounter

import ertacache
from ertacache.errors import StateError

CPU = torch.device("cpu")


def accelerate_parts(module) -> list:
    hook = getattr(module, "_hf_hook", None)
    return [h for h in (hook, *getattr(hook, "hooks", ())) if hasattr(h, "execution_device")]


def model_offload(pipe) -> None:
    pipe.enable_model_cpu_offload(device=CPU)


def sequential_offload(pipe) -> None:
    pipe.enable_sequential_cpu_offload(device=CPU)
    # diffusers asks for "cpu:0", which no tensor ever says it is on, so that accelerate would move for ever
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            for hook in accelerate_parts(module):
                hook.execution_device = CPU


def group_offload(pipe) -> None:
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level", use_stream=False)


def block_offload(pipe) -> None:
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def compile_in_place(pipe) -> None:
    pipe.transformer.compile(backend="eager")


def compile_wrapped(pipe) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


OFFLOADS = [model_offload, sequential_offload, group_offload, block_offload]
COMPILES = [compile_in_place, compile_wrapped]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_three_runs_and_removal(name, integrate, attach_first: bool) -> None:
    plain, cached = expected(name)
    calibration = fitted(name)
    pipe = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ertacache.MismatchWarning)
        if attach_first:
            applied = ertacache.apply(pipe, calibration)
            integrate(pipe)
        else:
            integrate(pipe)
            applied = ertacache.apply(pipe, calibration)
        for _ in range(3):
            assert torch.equal(call(pipe, name), cached)
    assert applied.reused_calls == applied.computed_calls > 0  # three of six steps
    ertacache.remove(pipe)
    assert torch.equal(call(pipe, name), plain)
    assert torch.equal(call(pipe, name), plain)


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("integrate", OFFLOADS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_offloading_in_either_order(name, integrate, attach_first):
    check_three_runs_and_removal(name, integrate, attach_first)


@pytest.mark.parametrize(
    ("name", "integrate", "attach_first"),
    [
        *(("flux", integrate, first) for integrate in COMPILES for first in (True, False)),
        *((name, *how) for name in NAMES[1:] for how in ((compile_wrapped, True), (compile_in_place, False))),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compilation_in_either_order(name, integrate, attach_first):
    check_three_runs_and_removal(name, integrate, attach_first)


@contextlib.contextmanager
def moves_counted(monkeypatch):
    """A list with an entry for each time that an offloading hook fetches weights."""
    moves = []
    original_align, original_onload = accelerate_hooks.set_module_tensor_to_device, group_offloading.ModuleGroup.onload_
    original_root = accelerate_hooks.CpuOffload.pre_forward
    with monkeypatch.context() as patch:
        patch.setattr(
            accelerate_hooks, "set_module_tensor_to_device", lambda *a, **k: (moves.append(1), original_align(*a, **k))
        )
        patch.setattr(
            group_offloading.ModuleGroup, "onload_", lambda *a, **k: (moves.append(1), original_onload(*a, **k))[1]
        )
        patch.setattr(
            accelerate_hooks.CpuOffload, "pre_forward", lambda *a, **k: (moves.append(1), original_root(*a, **k))[1]
        )
        yield moves


@pytest.mark.parametrize("integrate", OFFLOADS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_reused_step_moves_no_weights(name, integrate, monkeypatch):
    pipe = make(name)
    integrate(pipe)
    counts = []
    with ertacache.apply(pipe, fitted(name)), moves_counted(monkeypatch) as moves:

        def count(_pipe, _step, _timestep, state):
            counts.append(len(moves))
            return state

        call(pipe, name, callback_on_step_end=count)
    for step in range(1, tiny_models.NUM_STEPS):
        moved = counts[step] - counts[step - 1]
        assert (moved > 0) == (step in fitted(name).computed_steps), f"step {step} moved {moved} tensors"


def wrapped_fullgraph(pipe, backend) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


def in_place_fullgraph(pipe, backend) -> None:
    pipe.transformer.compile(backend=backend, fullgraph=True)


def repeated_blocks(pipe, backend) -> None:
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("integrate", "attach_first"),
    [(wrapped_fullgraph, False), (in_place_fullgraph, True), (repeated_blocks, False), (repeated_blocks, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_compiled_graphs_are_used_and_never_made_again(name, integrate, attach_first):
    """CogVideoX names no repeated blocks; its and Open-Sora's whole graphs are left to `fullgraph=False` above."""
    backend = CompileCounter()
    pipe = make(name)
    if attach_first:
        ertacache.apply(pipe, fitted(name))
    integrate(pipe, backend)
    ertacache.apply(pipe, fitted(name))
    first = call(pipe, name)
    compiled = backend.frame_count
    assert compiled > 0
    for _ in range(2):
        assert torch.equal(call(pipe, name), first)
    assert backend.frame_count == compiled
    torch.testing.assert_close(first, expected(name)[1])


def test_a_bare_transformer_wrapped_after_attaching_says_so():
    pipe = make("wan")
    model = pipe.transformer
    with ertacache.apply(model, fitted("wan")):
        wrapped = torch.compile(model, backend="eager")
        with pytest.raises(StateError, match="compile first, then apply"):
            wrapped(torch.zeros(1, 4, 2, 2, 2), torch.tensor([999.0]), torch.zeros(1, 20, 16))
    compiled = torch.compile(model, backend="eager")
    with ertacache.apply(compiled, fitted("wan")):
        assert compiled(torch.zeros(1, 4, 2, 2, 2), torch.tensor([999.0]), torch.zeros(1, 20, 16))[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_transformer_is_refused(name):
    pipe = make(name)
    ertacache.apply(pipe, fitted(name))
    pipe.transformer = make(name).transformer
    with pytest.raises(StateError, match="transformer was replaced"):
        call(pipe, name)
    ertacache.remove(pipe)
    assert torch.equal(call(pipe, name), expected(name)[0])


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_calibrating_a_compiled_and_offloaded_pipeline_gives_the_same_file(name):
    for integrate in (compile_wrapped, sequential_offload):
        pipe = make(name)
        integrate(pipe)
        made = tiny_models.calibrate(pipe, name)
        assert made.model == fitted(name).model and made.computed_steps == fitted(name).computed_steps
        for one, other in zip(made.coefficients, fitted(name).coefficients, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
