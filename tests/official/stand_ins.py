"""Stand-ins for what the packages import and a small model on a CPU does not need: training, files, CUDA kernels."""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest import mock

import diffusers  # noqa: F401 - both look for torchvision, and must not find its stand-in
import transformers  # noqa: F401


class Stand(types.ModuleType):
    """A module, and a package, that has everything."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes a `Stand` of each module below some names."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in self.names else None

    def create_module(self, spec):
        return Stand(spec.name)

    def exec_module(self, module):
        """Nothing to run."""


def stand_in(*names):
    """Answer imports of these packages, and of all that lies below them, with stand-ins where they are missing."""
    sys.meta_path.append(Finder(names))
