"""Fewer steps of the pipeline's own scheduler, the plainest rival."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compare.rivals.base import Rival, Setting


class FewerSteps(Rival):
    """Run K steps of the pipeline's own scheduler, on the grid it makes for K; `num_steps` is K."""

    name = "fewer-steps"
    knob = "num_steps"
    static = True

    def settings(self, num_steps: int) -> list[Setting]:
        return [{"num_steps": steps} for steps in range(1, num_steps)]

    @contextmanager
    def attach(self, pipe: Any, setting: Setting) -> Iterator[dict[str, Any]]:
        yield {"num_inference_steps": setting["num_steps"]}
