"""Muon, for linear layers and convolutions, in float32."""

import torch


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix of the averaged gradient (Jordan et al., 2024).

    `torch.optim.Muon` knows matrices alone and computes in bfloat16, which a CPU without instructions for it does
    hundreds of times slower. This one reads a convolution kernel (out, in, h, w) as the matrix (out, in * h * w). Its
    steps have the root mean square of AdamW's, so that both share a learning rate (arXiv 2502.16982, eq. 4).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov's
                size = 0.2 * max(ahead.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(ahead).view_as(p), alpha=-group["lr"] * size)


def orthogonal(matrix_MN: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About U V^T of the matrix U S V^T.

    A quintic Newton-Schulz iteration takes all but the smallest singular values into about [0.7, 1.2].
    """
    x = matrix_MN / (matrix_MN.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
