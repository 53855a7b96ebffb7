"""Gradient descent on matrices of channels through whole runs, on toys and on the four kinds of pipeline."""

import copy
import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from test_attach import run
from test_channels import gaussian
from test_refinement import unipc
from torch import nn
from toys import ToyPipeline

import ertacache
from ertacache import descent
from ertacache.announcement import Work
from ertacache.calibration import Calibration
from ertacache.descent import Descended, add_gradient, batches, descend, descent_evaluations, objective, parts
from ertacache.errors import CalibrationError, NumericsError
from ertacache.fit.end_to_end import refinement_evaluations
from ertacache.fit.rerun import Rerun
from ertacache.fit.runs import MICRO_BATCH, Runs, mean_log_error, recorded_runs
from ertacache.fit.step_by_step import REFINED_FORM, SAFE_FORM, Fitter
from ertacache.gradients import NO_GRADIENT, differentiable
from ertacache.matrices import MatrixRun, MatrixUnknowns
from ertacache.rectification import Coefficients

PROMPTS = [f"prompt {i}" for i in range(12)]
STEPS, SCHEDULE = 12, [0, 1, 3, 6, 9]
KINDS = {
    "plain": {},
    "guidance": {"guidance_scale": 3.0},  # two calls a step
    "unipc": {"scheduler": unipc},  # a solver that keeps outputs
}


def toy(kind: str = "plain", velocity=gaussian) -> ToyPipeline:
    made = dict(KINDS[kind])
    if "scheduler" in made:
        made["scheduler"] = made["scheduler"]()
    return ToyPipeline(velocity, **made)


def recorded(pipe=None, prompts=PROMPTS, **kwargs) -> Runs:
    return recorded_runs(pipe or toy(), prompts, seeds=range(len(prompts)), num_inference_steps=STEPS, **kwargs)


def started(runs: Runs) -> Coefficients:
    """The step-by-step fit to the prompts that are not left out."""
    fitter = Fitter(SCHEDULE, runs.recorded.latents, form=REFINED_FORM)
    runs.first(len(parts(len(runs))[0])).run(fitter)
    return fitter.fitted()


def descended(runs: Runs, steps: int = 20) -> Descended:
    with torch.no_grad():  # as within calibrate
        return descend(runs, SCHEDULE, started(runs), steps)


def calibrate(pipe, prompts=PROMPTS, **kwargs) -> Calibration:
    made_of = {"num_inference_steps": STEPS, "seeds": range(len(prompts)), "progress": False, "computed_steps": 5}
    return ertacache.calibrate(pipe, prompts, **{**made_of, "descent": 20, **kwargs})


# -- the gradient ------------------------------------------------------------------------------------------


def unknowns(runs: Runs, start: Coefficients) -> MatrixUnknowns:
    made = descent._nominal(runs, SCHEDULE, start, parts(len(runs))[0])[0]
    generator = torch.Generator().manual_seed(0)
    for value in made.values.values():
        value.data = 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return made


def loss(runs: Runs, start: Coefficients, matrices: MatrixUnknowns, median: float) -> float:
    """Without a gradient."""
    with torch.no_grad():
        final = runs.run(MatrixRun(SCHEDULE, start, matrices))
        return float(objective(runs.squared_errors(final), median).double().mean())


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_gradient_is_that_of_finite_differences(kind):
    """Of prompts that are neither the first ones nor in order, a few at a time."""
    runs = recorded(toy(kind), micro_batch=2)
    start, median = started(runs), 1e-4
    matrices, batch = unknowns(runs, start), runs.of([7, 2, 5])
    with differentiable(runs.pipe):
        add_gradient(batch, SCHEDULE, start, matrices, median)
    assert list(matrices.values) == [0, 2, 5, 8, 11]  # the last step of every segment
    for step, value in matrices.values.items():
        place = divmod(int(value.grad.abs().argmax()), value.shape[1])
        ends = []
        for nudge in (1e-1, -2e-1):
            value.data[place] += nudge
            ends.append(loss(batch, start, matrices, median))
        value.data[place] += 1e-1
        assert (ends[0] - ends[1]) / 2e-1 == pytest.approx(float(value.grad[place]), rel=2e-2), step


def test_the_gradient_does_not_depend_on_how_many_samples_the_transformer_sees():
    gradients = []
    for micro_batch in (1, 2, MICRO_BATCH):
        runs = recorded(micro_batch=micro_batch)
        start = started(runs)
        matrices = unknowns(runs, start)
        with differentiable(runs.pipe):
            add_gradient(runs.of([7, 2, 5]), SCHEDULE, start, matrices, 1e-4)
        gradients.append(torch.cat([value.grad for value in matrices.values.values()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-6)


def test_half_precision_would_hold_the_gradient(monkeypatch):
    """That of the final latents is about 1 over the prompts of the batch, however near these are to the reference."""
    runs, finals, real = recorded(), [], Runs.squared_errors
    start = started(runs)
    matrices, errors = descent._nominal(runs, SCHEDULE, start, list(range(9)))

    def kept(self, final):
        final.retain_grad()
        finals.append(final)
        return real(self, final)

    monkeypatch.setattr(Runs, "squared_errors", kept)
    with differentiable(runs.pipe):
        add_gradient(runs.of([7, 2, 5]), SCHEDULE, start, matrices, float(errors.median()))
    assert errors.median() < 1e-3 and 0.1 < 3 * float(finals[0].grad.square().mean().sqrt()) < 10


def test_one_unit_of_an_unknown_moves_the_state_by_a_fixed_share():
    """By SCALE of the initial latents, or less in directions in which outputs differ so little that the ridge holds."""
    runs = recorded()
    start = started(runs)
    matrices = descent._nominal(runs, SCHEDULE, start, list(range(9)))[0]
    plain = runs.first(9).run(MatrixRun(SCHEDULE, start, matrices))
    step = STEPS - 1  # after which nothing changes the state any more
    moved = []
    for place in range(len(matrices.values[step])):
        matrices.values[step].data.zero_()[place, 0] = 1
        moved.append(float((runs.first(9).run(MatrixRun(SCHEDULE, start, matrices)) - plain).detach().norm()))
    latents = runs.recorded.latents[0]
    wanted = 2e-3 * float(latents.std()) * math.sqrt(9 * latents[0].numel())
    assert 0.9 * wanted < max(moved) < 1.01 * wanted and sorted(moved)[-4] > 0.9 * wanted


def test_the_coefficients_are_those_of_the_run_with_gradients():
    runs = recorded()
    start = started(runs)
    matrices = unknowns(runs, start)
    made = matrices.coefficients(start)
    with torch.no_grad():
        wanted = runs.run(MatrixRun(SCHEDULE, start, matrices))
    torch.testing.assert_close(runs.run(Rerun(SCHEDULE, made)), wanted, rtol=0, atol=1e-4)  # rounded for the file
    assert made.outputs == start.outputs and made.latents_coefficients == start.latents_coefficients
    assert [step for step, terms in enumerate(made.matrices.steps) if terms] == list(matrices.values)


# -- the descent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_that_were_not_fitted_to_come_nearer(kind):
    """Six directions of their own power, with four outputs and shared weights to begin with."""
    runs = recorded(toy(kind))
    made = descended(runs, steps=40)
    assert made.left_out == [9, 10, 11]
    assert made.after < made.before - 0.3  # three decibels
    errors = runs.squared_errors(runs.run(Rerun(SCHEDULE, made.coefficients)))
    assert mean_log_error(errors[made.left_out]) == pytest.approx(made.after)


def test_where_nothing_helps_the_prompts_left_out_all_stays(monkeypatch):
    monkeypatch.setattr(descent, "RATE", 3.0)
    runs = recorded()
    made = descended(runs)
    assert made.coefficients == started(runs) and made.after == made.before


def test_the_best_state_is_kept_and_not_the_last(monkeypatch):
    """The errors of three looks: better, worse, worse still."""
    runs = recorded()
    start, looks = started(runs), []

    def errors(self, final):
        if final.requires_grad:
            return final.flatten(1).square().mean(1)
        looks.append(final)
        return torch.full((len(final),), [1.0, 0.5, 0.7, 0.9][len(looks) - 1])

    monkeypatch.setattr(Runs, "squared_errors", errors)
    monkeypatch.setattr(descent, "EVERY", 2)
    made = descend(runs, SCHEDULE, start, 5)
    assert len(looks) == 4 and made.after == pytest.approx(math.log10(0.5))
    assert torch.equal(runs.run(Rerun(SCHEDULE, made.coefficients)), looks[1])


def test_a_descent_that_goes_too_far_ends_with_what_was_best(monkeypatch):
    monkeypatch.setattr(descent, "EVERY", 4)
    runs, real, count = recorded(), descent.add_gradient, iter(range(100))
    wanted = descended(runs, steps=4)

    def overflows(*args):
        if next(count) == 4:
            raise NumericsError("NaN")
        real(*args)

    monkeypatch.setattr(descent, "add_gradient", overflows)
    monkeypatch.setattr(descent, "rate", lambda step, steps, real=descent.rate: real(step, 4))
    assert descended(runs, steps=40) == wanted and wanted.after < wanted.before


def test_the_same_result_twice():
    assert descended(recorded()) == descended(recorded())
    pipe = toy()
    assert calibrate(pipe, refine=6) == calibrate(pipe, refine=6)


def test_batches_take_every_prompt_once_before_any_twice():
    drawn = batches(list(range(40)))
    first = [next(drawn) for _ in range(4)]
    assert [len(rows) for rows in first] == [16] * 4
    assert len({*first[0], *first[1]}) == len({*first[2], *first[3]}) == 32
    assert sorted(next(batches([3, 4, 5]))) == [3, 4, 5]


def test_outputs_that_are_all_alike_leave_nothing_to_descend():
    """Zero, that is: no matrix could move the state."""
    runs = recorded(ToyPipeline(lambda x, sigma: torch.zeros_like(x)))
    start = Coefficients.of_outputs([[1.0]] * STEPS)
    assert descend(runs, SCHEDULE, start, 3).coefficients is start


# -- the pipeline afterwards -------------------------------------------------------------------------------


def state(pipe) -> tuple:
    """What a descent could have changed."""
    scheduler = {name: value for name, value in vars(pipe.scheduler).items() if not callable(value)}
    carrying = [v for v in scheduler.values() for v in (v if isinstance(v, list) else [v]) if torch.is_tensor(v)]
    return (
        [p.requires_grad for p in pipe.transformer.parameters()],
        [p.grad for p in pipe.transformer.parameters()],
        type(pipe),
        type(pipe.transformer),
        sorted(vars(pipe)),
        sorted(vars(pipe.scheduler)),
        any(tensor.requires_grad for tensor in carrying),
    )


def trained(kind: str = "plain") -> ToyPipeline:
    """A toy with a parameter that the output depends on, and one that is frozen already."""
    pipe = toy(kind)
    pipe.transformer.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    velocity, weight = pipe.transformer.velocity, pipe.transformer.weight
    pipe.transformer.velocity = lambda x, sigma: velocity(x, sigma) * weight[0]
    return pipe


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_pipeline_is_as_it_was(kind):
    pipe = trained(kind)
    before = run(pipe, STEPS).detach()
    with torch.no_grad():
        run(pipe, STEPS)
    was = state(pipe)
    assert was[0] == [True, False] and not was[-1]
    calibrate(pipe)
    assert state(pipe) == was and not any(p.grad is not None for p in pipe.transformer.parameters())
    copy.deepcopy(pipe.scheduler)
    assert torch.equal(run(pipe, STEPS), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("backward", [False, True])
def test_an_interrupted_descent_leaves_the_pipeline_as_it_was(error, backward):
    """On the way forward, and on the way back, where calls are made again."""
    pipe = trained("unipc")
    runs = recorded(pipe)
    with torch.no_grad():
        start, was = started(runs), state(pipe)
    velocity = pipe.transformer.velocity
    # twelve prompts are two calls a step; then eight of the batch go forward, and back but for step 0
    calls = 2 * len(SCHEDULE) + (len(SCHEDULE) + 2 if backward else 2)

    def breaks(x, sigma):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise error
        return velocity(x, sigma)

    pipe.transformer.velocity = breaks
    with torch.no_grad(), pytest.raises(error):
        descend(runs, SCHEDULE, start, 3)
    assert calls == 0
    pipe.transformer.velocity = velocity
    assert state(pipe) == was


# -- models without a gradient -----------------------------------------------------------------------------


class InInferenceMode(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(1))

    @torch.inference_mode()
    def forward(self, hidden_states, timestep, return_dict=True):
        return self.inner(hidden_states, timestep, return_dict)


class WithoutGradients(InInferenceMode):
    @torch.no_grad()
    def forward(self, hidden_states, timestep, return_dict=True):
        return self.inner(hidden_states, timestep, return_dict)


class Kernel(torch.autograd.Function):
    """One without a backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


@pytest.mark.parametrize("wrapper", [InInferenceMode, WithoutGradients])
@pytest.mark.parametrize("kind", ["plain", "guidance"])
def test_a_model_without_gradients_is_refused(wrapper, kind):
    pipe = toy(kind)
    pipe.transformer = wrapper(pipe.transformer)
    with pytest.raises(CalibrationError, match="needs gradients through the transformer"):
        calibrate(pipe)
    assert calibrate(pipe, descent=0).method == "ertacache"


def test_a_kernel_without_a_backward_is_refused():
    pipe = toy()
    velocity = pipe.transformer.velocity
    pipe.transformer.velocity = lambda x, sigma: Kernel.apply(velocity(x, sigma))
    with pytest.raises(CalibrationError, match="descent=0") as refusal:
        calibrate(pipe)
    assert str(refusal.value).startswith(NO_GRADIENT) and "\n" not in str(refusal.value)


def test_weights_of_inference_mode_are_refused():
    with torch.inference_mode():
        pipe = toy()
    with pytest.raises(CalibrationError, match="needs gradients through the transformer"):
        calibrate(pipe)


def test_a_caller_in_inference_mode_is_none_of_our_business():
    pipe = toy()
    wanted = calibrate(pipe)
    with torch.inference_mode():
        assert calibrate(pipe) == wanted


# -- what is refused before it takes long ------------------------------------------------------------------


def test_too_few_prompts_are_refused_before_the_first_evaluation():
    pipe = toy()
    with pytest.raises(CalibrationError, match=r"descent needs 8 calibration prompts or more.*there are 7"):
        calibrate(pipe, PROMPTS[:7])
    assert pipe.transformer.calls == 0
    assert parts(8) == (list(range(6)), [6, 7]) and parts(64)[1] == list(range(48, 64))


def test_latents_without_known_channels_are_refused(monkeypatch):
    monkeypatch.setattr(Runs, "layout", None)
    with pytest.raises(CalibrationError, match="descent needs latents whose channels are known"):
        calibrate(toy())


# -- calibrations ------------------------------------------------------------------------------------------


def test_a_calibration_with_descent_is_better_on_unseen_prompts(tmp_path):
    pipe = toy()
    plain, made = (calibrate(pipe, refine=9, descent=steps) for steps in (0, 40))
    assert made.computed_steps == plain.computed_steps and made.channel_axis == -3
    assert Calibration.load(made.save(tmp_path / "c.json")) == made
    unseen = tuple("abcdefgh")
    reference, errors = run(pipe, STEPS, prompts=unseen), []
    for calibration in (plain, made):
        with ertacache.apply(pipe, calibration):
            errors.append((run(pipe, STEPS, prompts=unseen) - reference).square().mean())
    assert errors[1] < 0.5 * errors[0]
    assert made.settings["descent"] == 40 and plain.settings["descent"] == 0


@pytest.mark.parametrize("asked", [{}, {"refine": 6}, {"refine": 99, "search_budget": 3}])
def test_the_prompts_left_out_have_no_part_in_the_fit(asked, monkeypatch):
    """Other noise for them leaves what descent starts from as it was."""
    starts = []
    monkeypatch.setattr(
        "ertacache.maker.descend",
        lambda runs, schedule, start, steps: (
            starts.append((schedule, start)) or Descended(start, [9, 10, 11], math.inf, math.inf)
        ),
    )
    for last in (9, 90):
        calibrate(toy(), seeds=[*range(9), last, last + 1, last + 2], **asked)
    (schedule, start), (same, other) = starts
    assert schedule == same

    def numbers(made: Coefficients) -> torch.Tensor:
        channels = [v for s in made.matrices.steps for m in s for r in m for v in r] if made.matrices else []
        return torch.tensor([*[a for row in made.outputs for a in row], *made.latents_coefficients, *channels])

    # the gains of the steps, which are measured on all prompts, differ by rounding
    torch.testing.assert_close(numbers(start), numbers(other), rtol=1e-2, atol=5e-3)


def test_the_prompts_left_out_tell_the_quality():
    pipe = toy()
    made = calibrate(pipe)
    generators = [torch.Generator().manual_seed(i) for i in (9, 10, 11)]
    pixels = []
    for calibration in (None, made):
        for generator, seed in zip(generators, (9, 10, 11), strict=True):
            generator.manual_seed(seed)
        if calibration is None:
            pixels.append(pipe(PROMPTS[9:], generator=generators, num_inference_steps=STEPS)[0])
        else:
            with ertacache.apply(pipe, calibration):
                pixels.append(pipe(PROMPTS[9:], generator=generators, num_inference_steps=STEPS)[0])
    psnr = -10 * (pixels[0] - pixels[1]).square().flatten(1).mean(1).log10()
    assert made.predicted["psnr"] == pytest.approx(float(psnr.mean()), abs=0.05)
    assert (made.predicted["folds"], made.predicted["left_out"]) == (1, 3)
    assert "12 calibration prompts, on 3 of them that were left out" in made.summary()
    assert calibrate(pipe, folds=0).predicted is None
    assert calibrate(pipe, computed_steps=STEPS).predicted["folds"] == 2  # nothing is fitted


def test_a_last_step_that_does_worse_on_the_prompts_left_out_is_not_taken(monkeypatch):
    def made(after: float) -> Calibration:
        monkeypatch.setattr(
            "ertacache.maker.descend", lambda runs, schedule, start, steps: Descended(start, [9, 10, 11], 0.0, after)
        )
        return calibrate(toy())

    fit = Fitter(made(-math.inf).computed_steps, (runs := recorded()).recorded.latents, form=SAFE_FORM)
    runs.first(9).run(fit)
    assert made(-math.inf).channel_coefficients is None and made(-math.inf).coefficients == fit.fitted().outputs
    again = made(math.inf).channel_coefficients
    assert again[-1] and not any(again[:-1])


@pytest.mark.parametrize("asked", [{}, {"refine": 6}, {"refine": 6, "search_budget": 4}, {"folds": 0}])
@pytest.mark.parametrize("count", [12, 40])
def test_the_announced_evaluations_are_a_bound(asked, count, monkeypatch):
    """What goes back counts as three calls, of which one is made here."""
    pipe, seen = toy(), []
    prompts = [f"prompt {i}" for i in range(count)]
    monkeypatch.setattr("ertacache.announcement.Announcement._print", lambda self, text: seen.append(self))
    calibrate(pipe, prompts, micro_batch=1, descent=25, **asked)
    work = Work(count, asked.get("folds", 2), asked.get("search_budget", 0), asked.get("refine", 0), False, 25)
    batch = min(16, count * 3 // 4)
    # step 0 has no latents to carry a gradient to, so that it is not made again
    spared = 25 * batch * (2 * 5 + 1)
    most = work.evaluations(STEPS, 5)
    assert seen[0].total == most
    rounds = refinement_evaluations(5, 6) * (3 if "search_budget" in asked else 1) if "refine" in asked else 0
    assert most - spared - rounds <= pipe.transformer.calls <= most - spared
    assert descent_evaluations(5, count, 25) == 5 * (3 * count + 4 * 25 * batch)


def test_the_bar_ends_where_it_was_announced(monkeypatch):
    moved = []
    bar = SimpleNamespace(update=moved.append)
    runs = recorded()
    runs.bar = bar
    start = started(runs)
    moved.clear()
    descend(runs, SCHEDULE, start, 25)
    assert sum(moved) == descent_evaluations(len(SCHEDULE), len(PROMPTS), 25)


# -- the four kinds of pipeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_descent_goes_through_every_kind_of_pipeline(name):
    """Their calls are decorated to have no gradients, with guidance of each kind; a few of eight prompts at a time."""
    pipe = tiny_models.make(name)
    prompts = [f"{tiny_models.PROMPTS[i % 2]} {i}" for i in range(8)]
    arguments = {**tiny_models.MODELS[name].arguments, "num_inference_steps": tiny_models.NUM_STEPS}
    runs = recorded_runs(pipe, prompts, seeds=range(8), micro_batch=3, **arguments)
    fitter = Fitter([0, 2, 4], runs.recorded.latents, form=REFINED_FORM)
    with torch.no_grad():
        runs.first(6).run(fitter)
        trained = [p.requires_grad for p in pipe.transformer.parameters()]
        pipe.transformer.requires_grad_(True)
        made = descend(runs, [0, 2, 4], fitter.fitted(), 12)
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters()) and trained
    assert made.after < made.before
