"""Muon in float32, for matrices and convolution kernels: torch's own works in bfloat16, which many CPUs emulate."""

import torch
from torch import Tensor

MOMENTUM = 0.95
# odd quintic whose iteration drives all singular values towards 1 (Jordan et al. 2024, "Muon")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix (rows, columns) with all its singular values brought near 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update of each parameter seen as (output channels, everything else).

    The step is as large as AdamW's would be (0.2 times the root of the longer side), so that both share a rate.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is not None:
                    self._update(kernel, group["lr"], group["weight_decay"])

    def _update(self, kernel: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum = state["momentum"]
        momentum.lerp_(kernel.grad, 1 - MOMENTUM)
        update = orthogonalized(kernel.grad.lerp(momentum, MOMENTUM).flatten(1))
        kernel.mul_(1 - lr * weight_decay)
        kernel.sub_(update.reshape(kernel.shape), alpha=lr * 0.2 * max(update.shape) ** 0.5)
