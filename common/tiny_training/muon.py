"""Muon in float32, for matrices and convolution kernels: torch's own works in bfloat16, which many CPUs emulate."""

import torch
from torch import Tensor

MOMENTUM = 0.95
# odd quintic whose iteration drives all singular values towards 1 (Jordan et al. 2024, "Muon")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with all their singular values brought near 1."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        # sums within the products: written out, they take nearly twice the time, a fifth of a training step
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update of each parameter seen as (output channels, everything else).

    The step is as large as AdamW's would be (0.2 times the root of the longer side), so that both share a rate.
    Parameters of one shape are worked on together.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for kernel in group["params"]:
                if kernel.grad is not None:
                    alike.setdefault(kernel.shape, []).append(kernel)
            for kernels in alike.values():
                self._update(kernels, group["lr"], group["weight_decay"])

    def _update(self, kernels: list[Tensor], lr: float, weight_decay: float) -> None:
        for kernel in kernels:
            if "momentum" not in self.state[kernel]:
                self.state[kernel]["momentum"] = torch.zeros_like(kernel)
        gradients = [kernel.grad for kernel in kernels]
        momenta = [self.state[kernel]["momentum"] for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        updates = orthogonalized(torch.stack([update.flatten(1) for update in ahead]))
        torch._foreach_mul_(kernels, 1 - lr * weight_decay)
        steps = [update.reshape(kernel.shape) for update, kernel in zip(updates, kernels, strict=True)]
        torch._foreach_sub_(kernels, steps, alpha=lr * 0.2 * max(updates.shape[1:]) ** 0.5)
