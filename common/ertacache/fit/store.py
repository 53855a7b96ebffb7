"""Keep recorded trajectories on the host: in memory, or in files above a limit."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ertacache.errors import CalibrationError


class TrajectoryStore:
    """Keep host copies of tensors in their own dtype, bit for bit.

    Above the limit each tensor lives in a file of its own that is mapped into memory: reading it works as ever, and
    the operating system drops its pages when memory is short. The files lie in the system's temporary folder and go
    when the store and its tensors do.

    Args:
        limit: bytes that may stay in memory; None for no limit.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.planned = 0
        self._files: tempfile.TemporaryDirectory | None = None
        self._count = 0

    @property
    def place(self) -> str:
        """The folder that files go to, whether or not there are any."""
        return self._files.name if self._files is not None else tempfile.gettempdir()

    @property
    def in_memory(self) -> bool:
        """Whether what is kept stays in memory."""
        return self._files is None

    def plan(self, total_bytes: int) -> None:
        """Announce how much will be kept, which decides where all of it goes.

        Raises CalibrationError: it does not fit on the disk. Writing to a mapped file would end the process instead.
        """
        self.planned = total_bytes
        if self.limit is None or total_bytes <= self.limit:
            return
        free = shutil.disk_usage(self.place).free
        if total_bytes > free:
            raise CalibrationError(
                f"the recorded trajectories take {total_bytes / 2**30:.1f} GiB, above the memory limit, and "
                f"{self.place} has {free / 2**30:.1f} GiB left: use fewer prompts, a higher limit, or another "
                "folder (TMPDIR)"
            )
        self._files = tempfile.TemporaryDirectory(prefix="ertacache-")

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous host copy of `tensor`, in memory or in a file."""
        # a copy even of a host tensor: the sampling loop may write into its own
        host = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self._files is None:
            return host
        path = Path(self._files.name) / f"{self._count:05d}.bin"
        self._count += 1
        values = host.reshape(-1)
        try:  # written, not copied into the mapped file: a disk that is full would end the process there
            with open(path, "xb") as file:
                file.write(values.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CalibrationError(f"{path} cannot be written ({error.strerror}): make room there") from error
        mapped = torch.from_file(str(path), shared=True, size=values.numel(), dtype=values.dtype)
        return mapped.view(host.shape)
