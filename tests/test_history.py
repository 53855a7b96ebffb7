"""What is kept of a run stays what it was, and takes no more memory than it needs."""

import pytest
import torch
from toys import ToyPipeline, ToyTransformer, curved

import ertacache
from ertacache.attach import attached
from ertacache.fit.record import Recorder
from ertacache.fit.step_by_step import Fitter
from ertacache.history import OutputHistory
from ertacache.micro_batches import call_in_micro_batches
from ertacache.replay import Replay

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


def pipeline(kind=ToyTransformer) -> ToyPipeline:
    pipe = ToyPipeline(curved)
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


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_a_calibration_on_reused_memory_is_the_same(micro_batch):
    wanted = calibrated(pipeline(), micro_batch=micro_batch)
    made = calibrated(pipeline(GraphTransformer), micro_batch=micro_batch)
    assert (made.computed_steps, made.coefficients) == (wanted.computed_steps, wanted.coefficients)
    assert made.predicted == wanted.predicted


def test_micro_batches_of_reused_memory_are_joined_as_they_were():
    model, inputs, times = GraphTransformer(curved), torch.randn(4, 3, 2, 2), torch.full((4,), 500.0)
    whole = ToyTransformer(curved)(inputs, times)[0]
    joined = call_in_micro_batches(model, model, (inputs, times), {}, 1)[0]
    assert torch.allclose(joined, whole)


@pytest.mark.parametrize("controller", ["replay", "fitter"])
def test_nothing_in_the_history_lies_where_the_next_output_goes(controller):
    """Looked at when the transformer runs, in both controllers that keep outputs."""
    pipe = pipeline(GraphTransformer)
    made = calibrated(pipe)
    recorder = Recorder()
    with attached(pipe, recorder):
        sample(pipe)
    keeping = Replay(made, pipe) if controller == "replay" else Fitter(made.computed_steps, recorder.latents)
    places = []

    def look(*_):
        (buffer,) = [b for shape, b in pipe.transformer.buffers.items() if shape[0] == 1]
        places.append([kept.data_ptr() == buffer.data_ptr() for kept in keeping.history])

    pipe.transformer.register_forward_pre_hook(look)
    with attached(pipe, keeping):
        sample(pipe)
    assert len(places) == 6 and places[-1] and not any(map(any, places))


def test_memory_is_copied_only_where_that_is_better():
    history, whole = OutputHistory(3), torch.randn(2, 8)
    history.add(whole[0])
    assert history[0].data_ptr() == whole.data_ptr()  # the loop holds it too
    history.before_reuse()
    assert history[0].untyped_storage().nbytes() == 8 * 4 and torch.equal(history[0], whole[0])
    own = history[0]
    history.before_computing()
    assert history[0] is own  # once is enough
    history.add(whole)
    history.before_reuse()
    assert history[0] is whole  # it needs all of its memory
    history.before_computing()
    assert history[0] is not whole and torch.equal(history[0], whole)


def test_the_oldest_goes_before_the_newest_is_copied():
    history = OutputHistory(2)
    for value in (1.0, 2.0):
        history.add(torch.tensor(value))
    history.before_computing()
    assert [float(kept) for kept in history] == [2.0]
    one = OutputHistory(1)
    one.add(torch.tensor(1.0))
    one.before_computing()
    assert len(one) == 0
