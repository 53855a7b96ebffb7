"""Generate with TeaCache (`run.sh --method teacache`), fitted and tuned on the calibration prompts."""

import sys
from typing import Any

from compare.rivals import PromptRun, TeaCache, Tuner
from ertacache.cli.folder import ModelFolder
from ertacache.cli.kept import calibration_prompts, computed_steps
from ertacache.cli.settings import Settings
from ertacache.errors import UsageError


def attached(pipe: Any, settings: Settings, model: ModelFolder) -> Any:
    """Run the pipeline with TeaCache inside a context, at the settings' threshold or number of computed steps."""
    if model.teacache_signal is None:
        raise UsageError(f"--method teacache is not available for {model.name}")
    rival = TeaCache(model.teacache_signal)
    arguments = model.arguments(settings)
    runs = [PromptRun(pipe, prompt, seed, arguments) for seed, prompt in enumerate(calibration_prompts(settings))]
    print(f"teacache: fitting its polynomial on {len(runs)} prompts", file=sys.stderr)
    name, value = settings.goal()
    tuner = Tuner(pipe, runs[:1], settings.num_inference_steps)
    tuner.prepare(rival, runs)
    setting = {"threshold": value}
    if name != "threshold":
        tuned = tuner.tune(rival, computed_steps(settings) / settings.num_inference_steps)
        setting = tuned.setting
        print(
            f"teacache: threshold {setting['threshold']:g} costs {tuned.fraction:.2f} of the uncached FLOPs",
            file=sys.stderr,
        )
    return rival.attach(pipe, setting)
