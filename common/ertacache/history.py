"""The last computed outputs of a run, newest first, in memory that nobody else writes to."""

from collections import deque

from torch import Tensor


class OutputHistory(deque[Tensor]):
    """Outputs that later steps combine; made for one length, beyond which the oldest goes.

    The newest one is at first kept as it came, since the sampling loop holds it too: a copy would only cost memory.
    It gets memory of its own as soon as that is better:

    - at a reused step, where the loop has let go of it, if it is a view that keeps more memory alive than it needs;
    - before the transformer runs again, since a transformer replayed from a CUDA graph writes every output into the
      same place. Then the oldest one goes first, which the coming output would push out anyway.
    """

    def __init__(self, length: int):
        super().__init__(maxlen=length)
        self._length = length
        self._newest_is_own = True

    def add(self, output: Tensor, is_own: bool = False) -> None:
        """A step was computed; `is_own` says that nobody else has the memory of its output."""
        self.appendleft(output)
        self._newest_is_own = is_own

    def before_reuse(self) -> None:
        """A step is going to be reused."""
        if self and self[0].untyped_storage().nbytes() > self[0].nbytes:
            self.own_newest()

    def before_computing(self) -> None:
        """The transformer is going to run."""
        while len(self) >= self._length:
            self.pop()
        self.own_newest()

    def own_newest(self) -> None:
        if self and not self._newest_is_own:
            self[0] = self[0].detach().clone()
        self._newest_is_own = True
