"""The trained tiny pipelines of the model folders, loaded as their own commands load them."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from record import ROOT

from ertacache.calibration import Calibration
from ertacache.cli import settings
from ertacache.cli.kept import kept_path, obtain_calibration

FOLDERS = {
    "flux": ROOT / "ERTACache4FLUX",
    "wan": ROOT / "ERTACache4Wan2.1",
    "cogvideox": ROOT / "ERTACache4CogVideoX",
    "opensora": ROOT / "ERTACache4OpenSora1.2",
}


def available() -> list[str]:
    """Names of the models whose folder holds a tiny pipeline."""
    return [name for name, folder in FOLDERS.items() if (folder / "tiny" / "model_index.json").exists()]


def subject_name(name: str) -> str:
    """What results call a model's tiny pipeline, as those of comparisons do."""
    return f"{tiny_module(name).MODEL_FOLDER.name} tiny"


def tiny_module(name: str) -> ModuleType:
    """The folder's generate.py."""
    with imports_from(FOLDERS[name]):
        return importlib.import_module("generate")


def tiny_pipeline(name: str, *flags: str) -> tuple[Any, Any, ModuleType]:
    """The pipeline, its settings and the folder's generate.py; `flags` are those of the folder's run.sh."""
    folder, module = FOLDERS[name], tiny_module(name)
    chosen = settings.parse(folder, ["--model", "tiny", *flags], "")
    chosen.compare = False
    pipe = module.load(chosen)
    pipe.set_progress_bar_config(disable=True)
    return pipe, chosen, module


@contextlib.contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """The folder's own modules, which have the same names in every folder, and no trace of them afterwards."""
    own = {path.stem for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def kept_counts(pipe: Any, chosen: Any, module: ModuleType) -> list[int]:
    """The numbers of computed steps for which the folder keeps a calibration, most first."""
    counts = range(chosen.num_inference_steps - 1, 0, -1)
    return [count for count in counts if kept_path(pipe, _asking(chosen, count), module.MODEL_FOLDER)]


def tiny_calibration(pipe: Any, chosen: Any, module: ModuleType, computed_steps: int) -> Calibration:
    """The folder's calibration for K computed steps; made and kept there where it is missing, as run.sh does."""
    with contextlib.redirect_stderr(io.StringIO()):
        return obtain_calibration(pipe, _asking(chosen, computed_steps), module.MODEL_FOLDER)[0]


def _asking(chosen: Any, computed_steps: int) -> Any:
    """The settings, with a number of computed steps for their goal."""
    chosen.speedup = chosen.min_psnr = chosen.threshold = None
    chosen.computed_steps = computed_steps
    return chosen
