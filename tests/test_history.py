"""What a run keeps is its own: outputs whose memory is written over, loops that write into what they are given."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toys import ToyPipeline, ToyTransformer, curved

import ertacache
from ertacache.attach import attached
from ertacache.cache import Cache, Coefficients, Row, combine
from ertacache.fit.micro_batch import in_micro_batches
from ertacache.fit.record import Recording
from ertacache.fit.step_by_step import StepFit
from ertacache.replay import cache_of

pytestmark = pytest.mark.core
STEPS = 12
PROMPTS = ["a", "b", "c"]


class GraphTransformer(ToyTransformer):
    """Writes every output of a shape into the same memory, as a transformer replayed from a CUDA graph does."""

    def forward(self, hidden_states, timestep, return_dict=True):
        (made,) = super().forward(hidden_states, timestep)
        buffers = self.__dict__.setdefault("buffers", {})
        return (buffers.setdefault(made.shape, torch.empty_like(made)).copy_(made),)


class ViewTransformer(ToyTransformer):
    """Returns half of the channels that it makes, as a view of all of them."""

    def forward(self, hidden_states, timestep, return_dict=True):
        (made,) = super().forward(hidden_states, timestep)
        return (torch.cat([made, made], dim=1).chunk(2, dim=1)[0],)


class WritingScheduler(FlowMatchEulerDiscreteScheduler):
    """Writes into the output that it is given, once it has used it."""

    def step(self, model_output, timestep, sample, return_dict=True):
        result = super().step(model_output, timestep, sample, return_dict=return_dict)
        model_output.fill_(1e6)
        return result


def pipeline(kind=ToyTransformer, scheduler=None) -> ToyPipeline:
    pipe = ToyPipeline(curved, scheduler)
    pipe.transformer = kind(curved)
    return pipe


def calibrated(pipe, **asked):
    asked = {"computed_steps": 6, "seeds": range(3), "num_inference_steps": STEPS, "progress": False, **asked}
    return ertacache.calibrate(pipe, PROMPTS, **asked)


def sample(pipe):
    generator = torch.Generator().manual_seed(5)
    return pipe("x", generator=generator, num_inference_steps=STEPS, output_type="latent")[0]


@pytest.mark.parametrize("kind", [GraphTransformer, ViewTransformer])
def test_outputs_in_reused_or_shared_memory_give_the_same_result(kind):
    made = calibrated(pipeline())
    assert max(map(len, made.coefficients)) > 1
    plain, other = pipeline(), pipeline(kind)
    with ertacache.apply(plain, made):
        expected = sample(plain)
    made.model["class"] = kind.__name__
    with ertacache.apply(other, made):
        assert torch.equal(sample(other), expected)


@pytest.mark.parametrize("rows", ["fitted", "the newest output as it is"])
def test_a_scheduler_that_writes_into_what_it_is_given_changes_nothing(rows):
    made = calibrated(pipeline())
    if rows != "fitted":
        made.coefficients[:] = [[1.0]] * STEPS
    plain, other = pipeline(), pipeline(scheduler=WritingScheduler(shift=1.0))
    with ertacache.apply(plain, made):
        expected = sample(plain)
    made.scheduler["class"] = "WritingScheduler"
    with ertacache.apply(other, made):
        assert torch.equal(sample(other), expected)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_a_calibration_on_reused_memory_is_the_same(micro_batch):
    wanted = calibrated(pipeline(), micro_batch=micro_batch)
    made = calibrated(pipeline(GraphTransformer), micro_batch=micro_batch)
    assert (made.computed_steps, made.coefficients) == (wanted.computed_steps, wanted.coefficients)
    assert made.predicted == wanted.predicted


def test_micro_batches_of_reused_memory_are_joined_as_they_were():
    pipe = pipeline(GraphTransformer)
    inputs, times = torch.randn(4, 3, 2, 2), torch.full((4,), 500.0)
    whole = ToyTransformer(curved)(inputs, times)[0]
    with attached(pipe, Recording().begin) as attachment:
        joined = in_micro_batches(attachment.interceptions["transformer"], (inputs, times), {}, 1)[0]
    assert pipe.transformer.calls == 4 and torch.allclose(joined, whole)


def keeping(kind: str) -> tuple[ToyPipeline, Cache]:
    """A pipeline with outputs in reused memory, and a cache of either kind for it."""
    pipe = pipeline(GraphTransformer)
    made = calibrated(pipe)
    recording = Recording()
    with attached(pipe, recording.begin, stepped=recording.stepped):
        sample(pipe)
    return pipe, cache_of(made) if kind == "replay" else StepFit(made.computed_steps, recording.latents)


@pytest.mark.parametrize("kind", ["replay", "fit"])
def test_nothing_in_the_history_lies_where_the_next_output_goes(kind):
    """Looked at when the transformer runs."""
    pipe, cache = keeping(kind)
    places = []

    def look(*_):
        (buffer,) = [b for shape, b in pipe.transformer.buffers.items() if shape[0] == 1]
        places.append([kept.data_ptr() == buffer.data_ptr() for kept in cache.history])

    pipe.transformer.register_forward_pre_hook(look)
    with attached(pipe, cache.begin):
        sample(pipe)
    assert len(places) == 6 and places[-1] and not any(map(any, places))


def test_the_history_is_as_long_as_the_longest_row_and_holds_nothing_beside_its_outputs():
    made, longest = calibrated(pipeline()), 2
    made = replace(made, coefficients=[row[:longest] for row in made.coefficients])
    made.model["class"] = "ViewTransformer"
    pipe, caches, held = pipeline(ViewTransformer), [], []
    with ertacache.apply(pipe, made) as applied:
        begin = applied._attachment.begin
        applied._attachment.begin = lambda scheduler: caches.append(begin(scheduler)) or caches[-1]
        pipe.transformer.register_forward_hook(
            lambda *_: held.append([o.untyped_storage().nbytes() for o in caches[-1].history])
        )
        sample(pipe)
    assert [len(sizes) for sizes in held] == [min(count, longest) for count in range(6)]
    assert {size for sizes in held for size in sizes} == {3 * 4 * 4 * 4}


class Call:
    """What a cache reads of a scheduler's step."""

    def __init__(self, value: float):
        self.model_output = self.sample = torch.full((1, 2), value)


def test_a_cache_that_begins_again_forgets_the_run_before():
    cache = Cache([0, 1], Coefficients([[1.0], [0.5, 0.5]], [0.0, 0.0]))
    for _ in range(2):
        cache.start(torch.device("cpu"))
        assert cache.output(0, Call(2.0)).tolist() == [[2.0, 2.0]]
        assert cache.output(1, Call(4.0)).tolist() == [[3.0, 3.0]] and len(cache.history) == 2
    cache.end()
    assert not cache.history


def test_a_cache_without_coefficients_keeps_one_output():
    assert Cache([0], Coefficients.of_outputs([])).history.maxlen == 1


def test_one_output_is_plain_with_a_coefficient_of_one_and_nothing_beside_it():
    newest, older, latents = torch.ones(3), torch.full((3,), 5.0), torch.full((3,), 7.0)
    made = combine([newest, older], Row([1.0]), latents)
    assert torch.equal(made, newest) and made is not newest  # whoever gets it may write into it
    for row, wanted in ((Row([2.0]), 2.0), (Row([1.0, 0.5]), 3.5), (Row([1.0], 1.0), 8.0)):
        assert combine([newest, older], row, latents).tolist() == [wanted] * 3
