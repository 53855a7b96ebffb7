"""What the library needs at run time: torch, numpy and tqdm; what else it uses is an extra, said where missing."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"pillow": "PIL", "scikit-image": "skimage", "protobuf": "google.protobuf"}
EXTRAS = [re.split(r"[\[><=]", name)[0] for name in PROJECT["optional-dependencies"]["run"]]
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = set(sys.argv[1:])
sys.meta_path.insert(0, Absent())
import pathlib, tempfile, torch, ertacache
from ertacache import hub, metrics

class Scheduler:
    def set_timesteps(self, steps):
        self.timesteps, self.sigmas = torch.linspace(1000, 1000 / steps, steps), torch.linspace(1, 0, steps + 1)
        self.index = 0
    def step(self, model_output, timestep, sample):
        self.index += 1
        return (sample + (self.sigmas[self.index] - self.sigmas[self.index - 1]) * model_output,)

class Model(torch.nn.Module):
    def forward(self, x, timestep, context):
        return (torch.tanh(x + context) * (0.5 + timestep / 1000),)

class Pipeline:
    def __init__(self):
        self.transformer, self.scheduler = Model(), Scheduler()
    def __call__(self, prompt, generator, num_inference_steps=8, output_type="pt"):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        x = torch.stack([torch.randn(3, 4, 4, generator=g) for g in generators])
        text = torch.tensor([len(p) for p in prompts])[:, None, None, None]
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t, text)[0], t, x)[0]
        return (x.sigmoid(),)

pipe = Pipeline()
made = ertacache.calibrate(pipe, ["a", "bb", "ccc", "dddd"], seeds=range(4), computed_steps=4, progress=False)
file = made.save(pathlib.Path(tempfile.mkdtemp()) / "c.json")
with ertacache.apply(pipe, file) as applied:
    pipe("bb", torch.Generator())
assert applied.reused_calls == 4
picture = torch.rand(1, 3, 16, 16)
for call in (lambda: hub.push(made, "me/it", "c.json"), lambda: metrics.ssim(picture, picture)):
    try:
        call()
    except ertacache.ERTACacheError as error:
        assert "pip install" in str(error)
    else:
        raise AssertionError
assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
"""


def test_torch_numpy_and_tqdm_are_enough():
    assert {re.split("[><=]", name)[0] for name in PROJECT["dependencies"]} == {"torch", "numpy", "tqdm"}
    absent = [IMPORTED_AS.get(name, name.replace("-", "_")) for name in EXTRAS]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *absent], capture_output=True, text=True, cwd=ROOT / "common")
    assert not done.returncode, done.stderr


def test_the_commands_extra_is_what_the_lock_holds():
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE))
    assert {name.replace("_", "-") for name in [*EXTRAS, "torch", "numpy", "tqdm"]} <= locked
