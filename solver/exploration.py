"""How a policy tries things out: drawing actions around its answer, their probability, their entropy.

A *choice* is what is drawn: for the Gaussian head the action itself, for the categorical head the number of a bin.

Shape suffixes: B rollouts, K steps, D actions, Z bins.
"""

import math

import torch
from torch import Tensor

from solver.scheduling_consistency_solver import SolverPolicy


def draw_choices(
    policy: SolverPolicy, outputs: Tensor, count: int, std: float, antithetic: bool, generator: torch.Generator
) -> Tensor:
    """Draws `count` choices for every step and action, `(B, K, D)` on the CPU.

    Args:
        policy: says which head `outputs` are of.
        outputs: means (K, D) or logits (K, D, Z).
        count: B.
        std: of the Gaussian head.
        antithetic: Gaussian head: neighbours 2 i and 2 i + 1 deviate from the mean by opposite amounts.
        generator: on the CPU.
    """
    outputs = outputs.detach().cpu()
    if policy.head == "categorical":
        probabilities = outputs.flatten(0, 1).softmax(dim=-1)
        drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        return drawn.T.reshape(count, *outputs.shape[:2])
    if not antithetic:
        return outputs + std * torch.randn(count, *outputs.shape, generator=generator)
    noise = std * torch.randn(count // 2, *outputs.shape, generator=generator)
    return outputs + torch.stack([noise, -noise], dim=1).flatten(0, 1)


def actions_of(policy: SolverPolicy, choices: Tensor) -> Tensor:
    """The actions `(B, K, D)` that choices stand for."""
    if policy.head == "categorical":
        return policy.action_values.cpu()[torch.arange(choices.shape[-1]), choices]
    return choices


def log_probability(policy: SolverPolicy, outputs: Tensor, choices: Tensor, std: float) -> Tensor:
    """Log-probability (categorical head) or log-density of each choice, `(B, K, D)`."""
    if policy.head == "categorical":
        log_probabilities = outputs.log_softmax(dim=-1).expand(*choices.shape, outputs.shape[-1])
        return log_probabilities.gather(-1, choices[..., None])[..., 0]
    return -0.5 * ((choices - outputs) / std).square() - math.log(std * math.sqrt(2 * math.pi))


def entropy(policy: SolverPolicy, outputs: Tensor, std: float) -> Tensor:
    """Entropy `(K, D)`: of the categorical head in units of ln(Z), so 1 where it is uniform; else in nats."""
    if policy.head == "categorical":
        log_probabilities = outputs.log_softmax(dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1) / math.log(outputs.shape[-1])
    return torch.full_like(outputs, math.log(std * math.sqrt(2 * math.pi * math.e)))


def divergence(policy: SolverPolicy, old_outputs: Tensor, outputs: Tensor, std: float) -> Tensor:
    """KL divergence `(K, D)` of the choices under `outputs` from those under `old_outputs`, in nats."""
    if policy.head == "categorical":
        old, new = old_outputs.log_softmax(dim=-1), outputs.log_softmax(dim=-1)
        return (old.exp() * (old - new)).sum(dim=-1)
    return 0.5 * ((outputs - old_outputs) / std).square()
