"""A pipeline that calibrates itself: the first results are watched, the next ones accelerated, and it is remembered."""

import copy
import fcntl
import threading
import warnings
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from toys import ToyPipeline, curved

import ertacache
from ertacache.auto import fitting, handle
from ertacache.auto.store import Store
from ertacache.calibration import Calibration
from ertacache.fit import store as fit_store
from ertacache.fit.runs import TRIED_STEPS

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("error::ertacache.EnableWarning")]

STEPS = 10
SAMPLES = 4
TRIED = 2 * TRIED_STEPS  # evaluations: two calls are tried side by side
FIT = SAMPLES * STEPS // 2 + TRIED


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(pipe, seed=0, steps=STEPS, **arguments):
    return pipe("a", generator=noise(seed), num_inference_steps=steps, **arguments)[0]


def plain(seed=0, steps=STEPS, **arguments):
    """The result without the library."""
    return call(ToyPipeline(curved), seed, steps, **arguments)


def enable(pipe, folder, **options):
    return ertacache.enable(pipe, **{"store": folder, "progress": False, **options})


@pytest.fixture
def ready(tmp_path):
    """An enabled pipeline that has seen its four results."""
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    for seed in range(SAMPLES):
        assert torch.equal(call(pipe, seed), plain(seed))
    return pipe, enabled


def evaluations(pipe, make) -> int:
    before = pipe.transformer.calls
    make()
    return pipe.transformer.calls - before


def only_file(folder) -> Calibration:
    [path] = folder.glob("*.json")
    return Calibration.load(path)


# -- watched, fitted, accelerated, stored ------------------------------------------------------------------


def test_four_results_are_watched_and_the_fifth_is_accelerated(ready, tmp_path):
    pipe, enabled = ready
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    [status] = enabled.status()
    assert (status.watched, status.accelerated, status.saved_calls) == (SAMPLES, 1, STEPS // 2)
    assert status.calibration == only_file(tmp_path)
    assert "5 of 10" in str(enabled.status())


def test_it_costs_two_uncached_runs_and_is_what_calibrate_gives(tmp_path):
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path)
    counts = [evaluations(pipe, lambda seed=seed: call(pipe, seed)) for seed in range(SAMPLES + 1)]
    assert counts == [STEPS, STEPS, STEPS, STEPS + FIT, STEPS // 2]
    asked = {"seeds": range(SAMPLES), "computed_steps": STEPS // 2, "effort": "fast", "num_inference_steps": STEPS}
    expected = ertacache.calibrate(ToyPipeline(curved), ["a"] * SAMPLES, progress=False, **asked)
    found = only_file(tmp_path)
    assert found.computed_steps == expected.computed_steps
    for one, other in zip(found.coefficients, expected.coefficients, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_another_process_accelerates_at_its_first_call(ready, tmp_path):
    pipe, other = ready[0], ToyPipeline(curved)
    enable(other, tmp_path)
    assert torch.equal(call(other, 9), call(pipe, 9)) and other.transformer.calls == STEPS // 2


def test_disabled_it_is_as_before(ready):
    pipe, enabled = ready
    enabled.disable()
    fresh = ToyPipeline(curved)
    assert torch.equal(call(pipe, 9), call(fresh, 9))
    assert type(pipe) is ToyPipeline and vars(pipe).keys() == vars(fresh).keys()
    assert vars(pipe.scheduler).keys() == vars(fresh.scheduler).keys()


WAYS = {
    "a batch": lambda pipe: [pipe(["a"] * 4, generator=[noise(i) for i in range(4)], num_inference_steps=STEPS)],
    "two batches": lambda pipe: [
        pipe(["a"] * 2, generator=[noise(i), noise(i + 1)], num_inference_steps=STEPS) for i in (0, 2)
    ],
    "one generator": lambda pipe: [pipe("a", generator=g, num_inference_steps=STEPS) for g in [noise(0)] * 4],
    "no generator": lambda pipe: [pipe("a", num_inference_steps=STEPS) for _ in range(4)],
    "latents": lambda pipe: [
        pipe("a", None, STEPS, latents=torch.randn(1, 3, 4, 4, generator=noise(i))) for i in range(4)
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_any_way_of_calling_counts(way, tmp_path):
    torch.manual_seed(5)
    expected, after = WAYS[way](ToyPipeline(curved)), torch.rand(1)
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    torch.manual_seed(5)
    found = WAYS[way](pipe)
    assert all(torch.equal(one, other) for (one,), (other,) in zip(found, expected, strict=True))
    assert torch.equal(torch.rand(1), after), "the global generator was moved on"
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2, enabled.status()


def test_a_scheduler_that_draws_from_the_global_generator(tmp_path):
    def made():
        return ToyPipeline(curved, FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True))

    torch.manual_seed(3)
    expected = [call(made(), seed) for seed in range(SAMPLES)]
    pipe = made()
    enable(pipe, tmp_path)
    torch.manual_seed(3)
    assert all(torch.equal(call(pipe, seed), result) for seed, result in enumerate(expected))
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2


def test_what_a_user_changes_after_a_call_is_not_what_is_made_again(tmp_path):
    pipe, latents = ToyPipeline(curved), torch.empty(1, 3, 4, 4)
    enable(pipe, tmp_path)
    for seed in range(SAMPLES):
        latents.normal_(generator=noise(seed))
        pipe("a", None, STEPS, latents=latents)
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2


def test_a_prediction_is_made_where_it_is_asked_for(tmp_path):
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path, min_psnr=50)
    for seed in range(SAMPLES):
        call(pipe, seed)
    made = enabled.status()[0].calibration
    assert made.predicted["psnr"] >= 50 and len(made.computed_steps) < STEPS
    assert float(ertacache.metrics.psnr(call(pipe, 9), plain(9))) > 45


# -- settings ----------------------------------------------------------------------------------------------


def test_settings_that_alternate_are_each_watched_and_then_accelerated(tmp_path):
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    for seed in range(SAMPLES):
        for steps in (10, 6):
            assert torch.equal(call(pipe, seed, steps), plain(seed, steps))
    assert [evaluations(pipe, lambda s=s: call(pipe, 9, s)) for s in (10, 6, 10)] == [5, 3, 5]
    assert len(enabled.status()) == len(list(tmp_path.glob("*.json"))) == 2


def test_guidance_on_or_off_and_another_scheduler_are_settings(ready):
    pipe, enabled = ready
    pipe.guidance_scale = 3.0
    guided = ToyPipeline(curved, guidance_scale=3.0)
    assert torch.equal(call(pipe, 7), call(guided, 7))
    pipe.guidance_scale, pipe.scheduler = 1.0, type(pipe.scheduler)(shift=3.0)
    assert torch.equal(call(pipe, 7), call(ToyPipeline(curved, pipe.scheduler.from_config(pipe.scheduler.config)), 7))
    pipe.scheduler = type(pipe.scheduler)(shift=1.0)
    assert evaluations(pipe, lambda: call(pipe, 7)) == STEPS // 2
    assert len(enabled.status()) == 3


@pytest.mark.filterwarnings("ignore::ertacache.MismatchWarning")
def test_another_guidance_scale_is_a_setting_if_told_so(tmp_path):
    counts = {}
    for strict in (False, True):
        pipe = ToyPipeline(curved, guidance_scale=3.0)
        enable(pipe, tmp_path, strict=strict)
        for seed in range(SAMPLES):
            call(pipe, seed)
        pipe.guidance_scale = 4.0
        counts[strict] = evaluations(pipe, lambda pipe=pipe: call(pipe, 9))
    assert counts == {False: STEPS, True: 2 * STEPS}  # two calls a step


def test_any_guidance_argument_is_compared(tmp_path):
    class Guided(ToyPipeline):
        def __call__(self, prompt, generator=None, num_inference_steps=8, output_type="pt", true_cfg_scale=1.0):
            return super().__call__(prompt, generator, num_inference_steps, output_type)

    for strict in (False, True):
        pipe = Guided(curved)
        enable(pipe, tmp_path, strict=strict)
        for seed in range(SAMPLES):
            call(pipe, seed)
        assert evaluations(pipe, lambda pipe=pipe: call(pipe, 9, true_cfg_scale=1.0)) == STEPS // 2
        if strict:
            assert evaluations(pipe, lambda pipe=pipe: call(pipe, 9, true_cfg_scale=4.0)) == STEPS
        else:
            with pytest.warns(ertacache.MismatchWarning, match="true cfg scale"):
                call(pipe, 9, true_cfg_scale=4.0)


def test_other_weights_are_another_setting(ready):
    pipe, _ = ready
    with torch.no_grad():
        pipe.transformer.weight += 1
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS


class Late(ToyPipeline):
    """Starts at a step of the grid, and is guided from another one on."""

    def __call__(self, prompt, generator=None, num_inference_steps=8, output_type="pt", first=0, guided_from=99):
        latents = torch.randn(1, 3, 4, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        self.scheduler.set_begin_index(first)
        for step, t in enumerate(self.scheduler.timesteps[first:]):
            for _ in range(1 + (step >= guided_from)):
                [output] = self.transformer(hidden_states=latents, timestep=t.expand(1), return_dict=False)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents if output_type == "latent" else latents.sigmoid(),)


def test_a_run_goes_on_uncached_where_its_guidance_is_of_another_kind(tmp_path):
    pipe = Late(curved)
    enable(pipe, tmp_path)
    for seed in range(SAMPLES):
        call(pipe, seed)
    with pytest.warns(ertacache.EnableWarning, match="uncached from step"), pytest.warns(ertacache.MismatchWarning):
        count = evaluations(pipe, lambda: call(pipe, 9, guided_from=4))
    made = only_file(tmp_path).computed_steps
    [later] = [step for step in made if step >= 4][:1]
    assert count == len([step for step in made if step < 4]) + 2 * (STEPS - later)


def test_shapes_of_one_grid_are_fitted_together(tmp_path):
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    for seed, side in enumerate((4, 6, 4, 6)):
        pipe("a", None, STEPS, latents=torch.randn(1, 3, side, side, generator=noise(seed)))
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    assert enabled.status()[0].calibration.latent_shape == [3, 4, 4]
    assert float(ertacache.metrics.psnr(call(pipe, 9), plain(9))) > 45


# -- the handle --------------------------------------------------------------------------------------------


def test_another_speed_up_needs_no_new_results(ready):
    pipe, enabled = ready
    enabled.speedup = 5
    assert evaluations(pipe, lambda: call(pipe, 9)) == SAMPLES * 2 + TRIED + 2
    enabled.speedup = 2
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2


def test_one_request_without_the_cache(ready):
    pipe, enabled = ready
    with enabled.using(speedup=1):
        assert torch.equal(call(pipe, 9), plain(9))
    assert not torch.equal(call(pipe, 9), plain(9))


@pytest.mark.parametrize("options", [{"speedup": 0.5}, {"samples": 0}, {"effort": "best"}, {"computed_steps": 2.5}])
def test_impossible_wishes_are_refused(options, tmp_path):
    pipe = ToyPipeline(curved)
    with pytest.raises(ertacache.CalibrationError, match=next(iter(options))):
        enable(pipe, tmp_path, **options)
    assert type(pipe) is ToyPipeline


# -- what goes wrong ---------------------------------------------------------------------------------------


def failing(monkeypatch, error):
    """Fits fail, until the list is emptied."""
    errors, fit = [error], fitting.calibrate_runs

    def calibrate_runs(*args):
        if errors:
            raise errors[0]
        return fit(*args)

    monkeypatch.setattr(fitting, "calibrate_runs", calibrate_runs)
    return errors


def test_an_interrupted_fit_is_made_by_the_next_call(tmp_path, monkeypatch):
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path)
    errors = failing(monkeypatch, KeyboardInterrupt())
    for seed in range(SAMPLES - 1):
        call(pipe, seed)
    with pytest.raises(KeyboardInterrupt):
        call(pipe, 3)
    errors.clear()
    assert evaluations(pipe, lambda: call(pipe, 9)) == FIT + STEPS // 2
    assert only_file(tmp_path).prompts["count"] == SAMPLES


def test_an_interrupt_in_the_middle_of_a_fit_leaves_the_pipeline_as_it_was(tmp_path):
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path)
    for seed in range(SAMPLES - 1):
        call(pipe, seed)
    forward, left = pipe.transformer.forward, [STEPS + 7]

    def interrupted(**arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return forward(**arguments)

    pipe.transformer.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        call(pipe, 3)
    del pipe.transformer.forward
    assert evaluations(pipe, lambda: call(pipe, 9)) == FIT + STEPS // 2


@pytest.mark.parametrize("retry", [True, False])
def test_a_fit_that_fails_costs_no_result(retry, tmp_path, monkeypatch):
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path, retry=retry)
    errors = failing(monkeypatch, MemoryError("full"))
    for seed in range(SAMPLES - 1):
        call(pipe, seed)
    with pytest.warns(ertacache.EnableWarning, match="full"):
        assert torch.equal(call(pipe, 3), plain(3))
    errors.clear()
    assert torch.equal(call(pipe, 9), plain(9)) is not retry


def test_noise_that_cannot_be_repeated_is_refused(tmp_path):
    class Restless(ToyPipeline):
        count = 0

        def __call__(self, prompt, generator=None, num_inference_steps=8, output_type="pt"):
            Restless.count += 1
            return super().__call__(prompt, noise(Restless.count), num_inference_steps, output_type)

    pipe = Restless(curved)
    enabled = enable(pipe, tmp_path)
    for _ in range(SAMPLES - 1):
        call(pipe)
    with pytest.warns(ertacache.EnableWarning, match="cannot be repeated"):
        call(pipe)
    assert evaluations(pipe, lambda: call(pipe)) == STEPS and enabled.status()[0].refused
    assert not list(tmp_path.glob("*.json"))


def test_a_damaged_entry_is_said_and_made_anew(ready, tmp_path):
    [path] = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:200])
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path)
    with pytest.warns(ertacache.EnableWarning, match=path.name):
        assert torch.equal(call(pipe, 0), plain(0))
    for seed in range(1, SAMPLES):
        call(pipe, seed)
    assert only_file(tmp_path) and evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2


def test_a_store_that_cannot_be_written_to_costs_no_acceleration(tmp_path, monkeypatch):
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path)
    for seed in range(SAMPLES - 1):
        call(pipe, seed)
    save = Calibration.save
    monkeypatch.setattr(Calibration, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.warns(ertacache.EnableWarning, match="No space left"):
        call(pipe, 3)
    monkeypatch.setattr(Calibration, "save", save)
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    assert only_file(tmp_path)  # as soon as there is room


def test_what_another_process_fits_is_not_fitted_again(tmp_path, ready):
    [path] = tmp_path.glob("*.json")
    found = path.read_bytes()
    path.unlink()
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path)
    with open(tmp_path / f".{path.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        counts = [evaluations(pipe, lambda seed=seed: call(pipe, seed)) for seed in range(SAMPLES + 1)]
        assert counts == [STEPS] * (SAMPLES + 1)
        path.write_bytes(found)
        assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2


def test_a_lock_of_a_process_that_is_gone_locks_nothing(tmp_path):
    (tmp_path / ".a.json.lock").write_text("999999 2020-01-01T00:00:00")
    with Store(tmp_path).lock("a.json") as mine:
        assert mine
        with Store(tmp_path).lock("a.json") as twice:
            assert not twice
    assert not list(tmp_path.iterdir())


# -- interrupted, called back, threads, shared parts -------------------------------------------------------


@pytest.fixture
def flux(tmp_path):
    pipe = tiny_models.make("flux")
    enabled = enable(pipe, tmp_path, samples=2, speedup=2)
    return pipe, enabled


def flux_call(pipe, **overrides):
    return tiny_models.call(pipe, "flux", **overrides)


def test_an_interrupted_run_is_not_counted(flux):
    pipe, enabled = flux

    def stop(pipe, step, _, tensors):
        pipe._interrupt = step >= 2
        return tensors

    def fail(*_):
        raise KeyboardInterrupt

    flux_call(pipe, callback_on_step_end=stop)
    with pytest.raises(KeyboardInterrupt):
        flux_call(pipe, callback_on_step_end=fail)
    assert torch.equal(flux_call(pipe), tiny_models.expected("flux")[0])
    assert enabled.status()[0].watched == 1


def test_a_callback_counts_unless_it_changes_the_run(flux):
    pipe, enabled = flux
    seen = []

    def look(_pipe, step, _timestep, tensors):
        seen.append(step)
        return tensors

    def change(_pipe, _step, _timestep, tensors):
        return {"latents": tensors["latents"] * 0.9}

    with pytest.warns(ertacache.EnableWarning, match="callback changes"):
        flux_call(pipe, callback_on_step_end=change)
    for _ in range(2):
        assert torch.equal(flux_call(pipe, callback_on_step_end=look), tiny_models.expected("flux")[0])
    assert seen == list(range(tiny_models.NUM_STEPS)) * 2, "called by the fit, too"
    flux_call(pipe, callback_on_step_end=look)
    assert enabled.status()[0].accelerated == 1


@pytest.mark.parametrize("watched_in", [True, False])
def test_runs_under_inference_mode(watched_in, flux):
    pipe, enabled = flux
    for inference in (watched_in, not watched_in, True, False):
        with torch.inference_mode(inference):
            flux_call(pipe)
    assert enabled.status()[0].accelerated == 2


def test_requests_of_many_threads(tmp_path):
    pipe, results = ToyPipeline(curved), []
    enabled = enable(pipe, tmp_path)

    def serve(first):
        for seed in range(first, first + 4):
            results.append((seed, call(copied(pipe), seed)))

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    for seed, result in results:
        assert torch.equal(result, plain(seed)) or torch.equal(result, call(pipe, seed))
    assert len(results) == 16 and enabled.status()[0].watched >= SAMPLES


def copied(pipe):
    """As a server has it: a pipeline and a scheduler for each request, one transformer for all."""
    made = copy.copy(pipe)
    made.scheduler = copy.deepcopy(pipe.scheduler)
    return made


def test_a_pipeline_that_shares_parts_goes_uncached_and_is_told(flux):
    pipe, enabled = flux
    for _ in range(3):
        flux_call(pipe)
    assert enabled.status()[0].accelerated == 1
    other = tiny_models.MODELS["flux"].make()
    other.scheduler, other.transformer = pipe.scheduler, pipe.transformer
    with pytest.warns(ertacache.EnableWarning, match="another pipeline"):
        assert torch.equal(flux_call(other), tiny_models.expected("flux")[0])
    with pytest.raises(ertacache.StateError, match="attached already"):
        ertacache.enable(other)


def test_a_run_from_the_middle_is_a_setting_of_its_own(tmp_path):
    made = tiny_models.MODELS["flux"].make()
    pipe = FluxImg2ImgPipeline(**made.components)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt_embeds": torch.randn(1, 5, 12, generator=noise(0)),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=noise(1)),
        "image": torch.rand(1, 3, 16, 16, generator=noise(2)),
        "height": 16,
        "width": 16,
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    strengths = (0.5, 1.0)
    expected = [pipe(**arguments, strength=strength, generator=noise(3))[0] for strength in strengths]
    enabled = enable(pipe, tmp_path, samples=1)
    for strength, uncached in zip(strengths, expected, strict=True):
        assert torch.equal(pipe(**arguments, strength=strength, generator=noise(3))[0], uncached)
    for strength in strengths:
        pipe(**arguments, strength=strength, generator=noise(5))
    made = {status.calibration.num_inference_steps: status for status in enabled.status()}
    assert [(len(made[n].calibration.computed_steps), made[n].accelerated) for n in (3, 6)] == [(1, 1), (3, 1)]


def test_copies_of_an_enabled_pipeline_are_enabled(ready):
    pipe, enabled = ready
    assert torch.equal(call(copied(pipe), 9), call(pipe, 9)) and enabled.status()[0].accelerated == 2
    assert torch.equal(call(copy.deepcopy(pipe), 9), call(pipe, 9)) and enabled.status()[0].accelerated == 4


def test_a_pipeline_made_of_an_enabled_one_is_let_be(flux):
    pipe, _ = flux
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert type(other) is FluxImg2ImgPipeline and other.transformer is pipe.transformer


def test_a_transformer_that_is_compiled_since(ready):
    pipe, _ = ready
    accelerated = call(pipe, 9)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(call(pipe, 9), accelerated)


def test_a_pipeline_that_changed_is_not_fitted_to_what_it_was(ready):
    pipe, enabled = ready
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler)(shift=3.0)
    enabled.speedup = 5  # for the setting that was used last, which is no more
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS
    pipe.scheduler = scheduler
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS
    assert evaluations(pipe, lambda: call(pipe, 9)) == SAMPLES * 2 + TRIED + 2


def test_several_runs_in_a_call_go_uncached_and_are_told(tmp_path):
    class Twice(ToyPipeline):
        def __call__(self, prompt, generator=None, num_inference_steps=8, output_type="pt"):
            [latents] = super().__call__(prompt, generator, num_inference_steps, "latent")
            return super().__call__(prompt, generator, num_inference_steps, output_type, latents)

    pipe = Twice(curved)
    enabled = enable(pipe, tmp_path)
    with pytest.warns(ertacache.EnableWarning, match="several runs"):
        assert torch.equal(call(pipe), call(Twice(curved)))
    assert enabled.status()[0].watched == 0


def test_an_adapter_warns_or_is_a_setting_of_its_own(tmp_path):
    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.lora_A, self.active_adapters = layer, torch.nn.ModuleDict(), ["mine"]
            self.lora_A["mine"] = torch.nn.Linear(1, 1)

        def get_delta_weight(self, _):
            return torch.ones(2, 2)

    def with_adapter(strict):
        pipe = ToyPipeline(curved)
        pipe.transformer.layer = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(pipe.transformer.layer.weight), torch.nn.init.zeros_(pipe.transformer.layer.bias)
        enable(pipe, tmp_path, strict=strict)
        for seed in range(SAMPLES):
            call(pipe, seed)
        pipe.transformer.layer = Adapted(pipe.transformer.layer)
        return pipe

    pipe = with_adapter(strict=False)
    with pytest.warns(ertacache.MismatchWarning, match="weights differ"):
        assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    pipe = with_adapter(strict=True)
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS


# -- trust and memory --------------------------------------------------------------------------------------


def test_audits_measure_and_give_the_uncached_result(tmp_path):
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path, audit_every=2)
    for seed in range(SAMPLES):
        call(pipe, seed)
    accelerated, audited = call(pipe, 7), call(pipe, 7)
    assert torch.equal(audited, plain(7)) and not torch.equal(accelerated, audited)
    expected = float(ertacache.metrics.psnr(accelerated, audited))
    assert enabled.status()[0].audits == [pytest.approx(expected, abs=0.01)]


def test_audits_warn_of_less_than_was_promised(ready, tmp_path):
    [path] = tmp_path.glob("*.json")
    found = Calibration.load(path)
    found.settings["fitted_psnr"] += 4
    found.save(path)
    pipe = ToyPipeline(curved)
    enable(pipe, tmp_path, audit_every=1)
    call(pipe, 7)
    with pytest.warns(ertacache.EnableWarning, match="promised"):
        call(pipe, 8)


def test_watched_runs_above_the_limit_lie_in_files(tmp_path):
    one = (2 * STEPS + 1) * 3 * 4 * 4 * 4  # 2 N + 1 tensors of float32
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path, memory_limit=2 * one)
    for seed in range(SAMPLES):
        assert torch.equal(call(pipe, seed), plain(seed))
    assert evaluations(pipe, lambda: call(pipe, 9)) == STEPS // 2
    [known] = enabled._known.values()
    assert [part.nbytes for part in known.watched] == [one] * SAMPLES
    assert [part.bytes_in_memory for part in known.watched] == [one, one, 0, 0]


def test_a_disk_that_is_full_costs_the_watched_run_alone(tmp_path, monkeypatch):
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path, memory_limit=0)
    monkeypatch.setattr(fit_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.warns(ertacache.EnableWarning, match="0.0 GiB left"):
        assert torch.equal(call(pipe), plain())
    assert enabled.status()[0].watched == 0


def test_what_was_watched_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(handle, "KEPT_LIMIT", (2 * STEPS + 1) * 3 * 4 * 4 * 4)
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    call(pipe, 0)
    call(pipe, 0, 6)
    assert [status.watched for status in enabled.status()] == [1, 0]


def test_watching_holds_no_run_that_failed(tmp_path, monkeypatch):
    pipe = ToyPipeline(curved)
    enabled = enable(pipe, tmp_path)
    monkeypatch.setattr(handle, "WatchedCall", lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
    with pytest.warns(ertacache.EnableWarning, match="no room"):
        assert torch.equal(call(pipe), plain())
    assert enabled.status()[0].watched == 0


def test_nothing_is_said_without_a_reason(ready):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(ready[0], 9)


def test_a_calibration_applied_in_between_gives_way_again(ready, tmp_path):
    pipe, _ = ready
    accelerated = call(pipe, 9)
    other = ertacache.calibrate(
        ToyPipeline(curved), ["a", "b"], seeds=range(2), computed_steps=3, num_inference_steps=STEPS, progress=False
    )
    with ertacache.apply(pipe, other) as applied:
        assert not torch.equal(call(pipe, 9), accelerated) and applied.computed_calls == 3
    assert torch.equal(call(pipe, 9), accelerated)
    # while the first results are watched, what it made is none of them
    watched = ToyPipeline(curved)
    enable(watched, tmp_path / "other")
    with ertacache.apply(watched, other):
        call(watched, 9)
    for seed in range(SAMPLES):
        assert torch.equal(call(watched, seed), plain(seed))
    assert not torch.equal(call(watched, 9), plain(9))
