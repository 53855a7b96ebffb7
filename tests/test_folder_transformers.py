"""The folders' transformer classes: their own forward runs no block on a reused step, loaded, compiled or offloaded."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import test_robust_order
import tiny_models
import torch
from test_robust_order import OFFLOADS, fresh_compiler  # noqa: F401  # the fixture
from tiny_models import NAMES, call, expected, fitted, make
from tiny_pipelines import tiny_module, tiny_pipeline

import ertacache
from ertacache.attach import CachedTransformer
from ertacache.provenance import class_name

CLASSES = {
    "flux": "CachedFluxTransformer2DModel",
    "wan": "CachedWanTransformer3DModel",
    "cogvideox": "CachedCogVideoXTransformer3DModel",
    "opensora": "CachedSTDiT3",
}
BLOCKS = {
    "flux": "transformer_blocks",
    "wan": "blocks",
    "cogvideox": "transformer_blocks",
    "opensora": "spatial_blocks",
}
CALLS = {"wan": 2}  # of the transformer in a step; 1 for the others


@functools.cache
def folder_class(name: str) -> type:
    """The class that the folder's generate.py loads."""
    return getattr(tiny_module(name), CLASSES[name])


def make_cached(name: str):
    """The tiny random pipeline with the folder's class."""
    pipe = make(name)
    pipe.transformer.__class__ = folder_class(name)
    return pipe


@contextmanager
def entered(kind: type, monkeypatch) -> Iterator[list[int]]:
    """An entry for each time that the forward of the class itself is entered."""
    calls, original = [], kind.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        yield calls


def counted_blocks(pipe, name: str) -> list[int]:
    """An entry for each time that the first block runs."""
    calls = []
    getattr(pipe.transformer, BLOCKS[name])[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_the_class_is_the_models_own_with_one_modified_line(name):
    kind, plain = folder_class(name), type(make(name).transformer)
    assert issubclass(kind, CachedTransformer) and issubclass(kind, plain)
    assert [key for key in vars(kind) if callable(vars(kind)[key])] == ["forward"]
    pipe = make_cached(name)
    assert class_name(pipe.transformer) == plain.__name__  # calibrations of either class serve both
    assert torch.equal(call(pipe, name), expected(name)[0])
    made = tiny_models.calibrate(pipe, name)
    assert (made.model, made.coefficients) == (fitted(name).model, fitted(name).coefficients)


@pytest.mark.core
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_block_runs_on_a_reused_step(name, cached, monkeypatch):
    """In the folder's class because its own forward, which is entered, asks; in diffusers' own because it is not."""
    pipe = make_cached(name) if cached else make(name)
    blocks, a_step = counted_blocks(pipe, name), CALLS.get(name, 1)
    with ertacache.apply(pipe, fitted(name)) as applied, entered(type(pipe.transformer), monkeypatch) as forwards:
        assert torch.equal(call(pipe, name), expected(name)[1])
    computed = tiny_models.COMPUTED_STEPS * a_step
    assert (applied.computed_calls, applied.reused_calls) == (computed, tiny_models.NUM_STEPS * a_step - computed)
    assert len(blocks) == computed
    assert len(forwards) == (tiny_models.NUM_STEPS * a_step if cached else computed)
    assert torch.equal(call(pipe, name), expected(name)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_its_line_or_its_mixin_would_be_seen(name, monkeypatch):
    """The two faults, planted: blocks run on every step, or there is nothing to ask."""
    kind, plain = folder_class(name), type(make(name).transformer)
    pipe = make_cached(name)
    blocks = counted_blocks(pipe, name)
    with monkeypatch.context() as patch, ertacache.apply(pipe, fitted(name)):
        patch.setattr(kind, "forward", plain.forward)
        call(pipe, name)
    assert len(blocks) == tiny_models.NUM_STEPS * CALLS.get(name, 1)
    bare = make(name)
    bare.transformer.__class__ = type("WithoutMixin", (plain,), {"forward": vars(kind)["forward"]})
    with pytest.raises((AttributeError, TypeError)):
        call(bare, name)


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_the_folders_load_gives_it(name, monkeypatch):
    """The folder's own load() on its tiny pipeline, with every other step reused."""
    pipe, chosen, module = tiny_pipeline(name, "--num-inference-steps", "4", "--dtype", "float32")
    kind = type(pipe.transformer)
    assert kind.__name__ == CLASSES[name] and issubclass(kind, CachedTransformer)
    arguments = {"prompt": "a red star", "output_type": "latent", **module.MODEL_FOLDER.arguments(chosen)}

    def run() -> torch.Tensor:
        with torch.no_grad():
            return pipe(generator=torch.Generator().manual_seed(0), **arguments)[0]

    made = ertacache.calibrate(
        pipe,
        ["a blue ring"],
        computed_steps=2,
        effort="fast",
        progress=False,
        **{key: value for key, value in arguments.items() if key not in ("prompt", "output_type")},
    )
    blocks, a_step = counted_blocks(pipe, name), CALLS.get(name, 1)
    with entered(kind, monkeypatch) as forwards, ertacache.apply(pipe, made) as applied:
        cached = run()
    assert (applied.computed_calls, applied.reused_calls) == (2 * a_step, 2 * a_step)
    assert (len(blocks), len(forwards)) == (2 * a_step, 4 * a_step)
    plain = next(base for base in kind.__mro__ if not issubclass(base, CachedTransformer))
    pipe.transformer.__class__ = plain  # the same calibration, attached to diffusers' own class
    with ertacache.apply(pipe, made):
        assert torch.equal(run(), cached)
    assert len(blocks) == 4 * a_step and not torch.equal(run(), cached)


# -- compiled and offloaded ------------------------------------------------------------------------------


def in_place(pipe, backend) -> None:
    pipe.transformer.compile(backend=backend)


def wrapped(pipe, backend) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


@pytest.mark.parametrize(
    ("compiled", "attach_first"), [(in_place, True), (wrapped, False)], ids=["in_place-True", "wrapped-False"]
)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_graphs_run_on_computed_steps_only(name, compiled, attach_first):
    ran = []

    def backend(graph, _inputs):
        def running(*args):
            ran.append(1)
            return graph(*args)

        return running

    pipe = make_cached(name)
    if attach_first:
        applied = ertacache.apply(pipe, fitted(name))
    compiled(pipe, backend)
    if not attach_first:
        applied = ertacache.apply(pipe, fitted(name))
    each_step, originals = [], []

    def count(_pipe, _step, _timestep, state):
        each_step.append(len(ran))
        return state

    for _ in range(2):
        ran.clear(), each_step.clear()
        assert torch.equal(call(pipe, name, callback_on_step_end=count), expected(name)[1])
        originals.append([after > before for before, after in pairwise([0, *each_step])])
    assert originals[-1] == [step in fitted(name).computed_steps for step in range(tiny_models.NUM_STEPS)]
    assert applied.computed_calls == applied.reused_calls > 0
    ertacache.remove(pipe)
    assert torch.equal(call(pipe, name), expected(name)[0])


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("integrate", OFFLOADS, ids=lambda f: f.__name__)
def test_offloaded_weights_stay_where_they_are_on_a_reused_step(integrate, attach_first, monkeypatch):
    name, counts = "wan", []
    pipe = make_cached(name)
    if attach_first:
        ertacache.apply(pipe, fitted(name))
    integrate(pipe)

    def count(_pipe, _step, _timestep, state):
        counts.append(len(moves))
        return state

    with ertacache.apply(pipe, fitted(name)), test_robust_order.moves_counted(monkeypatch) as moves:
        assert torch.equal(call(pipe, name, callback_on_step_end=count), expected(name)[1])
    ertacache.remove(pipe)  # what was applied first is attached again
    moved = [after > before for before, after in pairwise(counts)]
    assert moved == [step in fitted(name).computed_steps for step in range(1, tiny_models.NUM_STEPS)]
    assert torch.equal(call(pipe, name), expected(name)[0])


def test_a_first_step_that_is_to_be_reused_is_refused():
    """By either class: there is nothing yet that a placeholder could look like."""
    for pipe in (make("flux"), make_cached("flux")):
        with ertacache.apply(pipe, fitted("flux")) as applied:
            begin = applied._attachment.begin

            def late(scheduler, begin=begin):
                cache = begin(scheduler)
                cache.schedule = frozenset([1])
                return cache

            applied._attachment.begin = late
            with pytest.raises(ertacache.StateError, match="step 0 must be computed"):
                call(pipe, "flux")
