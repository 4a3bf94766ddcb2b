"""The arithmetic of PPO on groups of rollouts: advantages and the clipped loss.

Shape suffixes: B rollouts, K steps, S steps of several cells, D actions, F policy inputs.
Sources: the loss is arXiv 1707.06347, the group as baseline arXiv 2402.03300.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solver.exploration import divergence, entropy, log_probability
from solver.scheduling_consistency_solver import SolverPolicy


class Elsewhere(NamedTuple):
    """Where an iteration should change nothing: the steps of all cells (K, guidance scale) but its own, one after the
    other.

    Attributes:
        inputs_SF: what the policy sees at these steps.
        mask_SD: which actions matter.
        outputs: the policy's answer before the update.
    """

    inputs_SF: Tensor
    mask_SD: Tensor
    outputs: Tensor


class Rollouts(NamedTuple):
    """What the updates of an iteration need, on the device of the policy.

    Attributes:
        iteration: its number, from 0.
        inputs_KF: what the policy sees.
        mask_KD: which actions matter; the others carry neither ratio nor entropy.
        choices_BKD: what was drawn, see `solver.exploration`.
        old_log_prob_BKD: of the choices, under the policy that drew them.
        advantages_B: what a rollout's reward is above the mean of its group, scaled.
        std: of the exploration.
        elsewhere: the other cells, if the update is to spare them.
    """

    iteration: int
    inputs_KF: Tensor
    mask_KD: Tensor
    choices_BKD: Tensor
    old_log_prob_BKD: Tensor
    advantages_B: Tensor
    std: float
    elsewhere: Elsewhere | None = None


def group_advantages(rewards_B: Tensor, group_size: int, scale_rewards: str = "group") -> tuple[Tensor, float]:
    """(R - mean) / std, the mean of each group of neighbours; 0 in a group where all rewards are equal.

    Args:
        rewards_B: of whole groups, one after the other.
        group_size: of each.
        scale_rewards: where the std is taken. "group": of each, so that all prompts count alike. "batch": the root
            mean square of all groups' stds, so that a prompt counts as much as solvers differ on it. (TRL's GRPO takes
            the std of the rewards themselves; prompts differ more than solvers, whose share it would make small.)

    Returns:
        advantages (B,), and the fraction of groups that are constant.
    """
    rewards = rewards_B.view(-1, group_size)
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    constant = std <= 1e-5 * mean.abs().clamp(min=1)  # nothing but rounding
    centred = torch.where(constant, 0.0, rewards - mean)
    if scale_rewards == "batch":
        std = std.square().mean().sqrt()
    advantages = torch.where(constant, 0.0, centred / torch.where(constant, 1.0, std))
    return advantages.flatten(), constant.float().mean().item()


def ppo_loss(
    policy: SolverPolicy, outputs: Tensor, rollouts: Rollouts, clip_range: float, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean over rollouts and live steps of min(A ρ, A clip(ρ)), minus `entropy_coef` times the mean entropy.

    ρ is the ratio of new to old probability of all live actions of a step together. A step without a live action is
    left out.

    Args:
        policy: says which head `outputs` are of.
        outputs: its answer to `rollouts.inputs_KF`, with gradient.
        rollouts: of the iteration.
        clip_range: ρ counts within 1 ± this.
        entropy_coef: weight of the bonus.

    Returns:
        the loss, and its metrics by TRL's names.
    """
    mask_KD, advantages_B1 = rollouts.mask_KD, rollouts.advantages_B[:, None]

    # Policy loss
    log_prob_BKD = log_probability(policy, outputs, rollouts.choices_BKD, rollouts.std)
    log_ratio_BKD = torch.where(mask_KD, log_prob_BKD - rollouts.old_log_prob_BKD, 0.0)
    log_ratio_BK = log_ratio_BKD.sum(dim=-1)[:, mask_KD.any(dim=1)]
    ratio_BK = log_ratio_BK.exp()
    gain_BK = advantages_B1 * ratio_BK
    clipped_gain_BK = advantages_B1 * ratio_BK.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = -torch.minimum(gain_BK, clipped_gain_BK).mean()

    # Entropy bonus
    entropy_KD = torch.where(mask_KD, entropy(policy, outputs, rollouts.std), 0.0)
    mean_entropy = entropy_KD.sum() / mask_KD.sum()

    metrics = {
        "entropy": mean_entropy,
        "approx_kl": (ratio_BK - 1 - log_ratio_BK).mean(),
        "clip_ratio/region_mean": (clipped_gain_BK < gain_BK).float().mean(),
    }
    return policy_loss - entropy_coef * mean_entropy, {name: value.detach() for name, value in metrics.items()}


def anchor_loss(policy: SolverPolicy, outputs: Tensor, elsewhere: Elsewhere, std: float) -> Tensor:
    """Mean over the steps of all other cells of the KL divergence between the answer before and after the update.

    The cells share a network, and the rollouts of one say nothing about the others: without this an update for one is
    a random one for the rest, and by the time that they have their turn again they have forgotten.

    Args:
        policy: says which head `outputs` are of.
        outputs: its answer to `elsewhere.inputs_SF`, with gradient.
        elsewhere: the other cells.
        std: of the exploration.
    """
    divergence_SD = divergence(policy, elsewhere.outputs, outputs, std)
    return torch.where(elsewhere.mask_SD, divergence_SD, 0.0).sum(dim=-1).mean()
