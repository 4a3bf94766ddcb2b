"""Mixture: several rewards as one."""

import math
from collections.abc import Mapping, Sequence

import torch

from rewards import load_reward
from rewards.base import Reward

Features = Mapping[str, torch.Tensor]


class Mixture(Reward):
    """The plain weighted sum of several rewards: Σ weight · score. Weights are not normalised, scales not matched.

        Mixture({"depth": 1.0, "dino": 0.5}, models={"depth": "zoo/depth"})
        Mixture([depth, dino], [1.0, 0.5])

    Features are a dict, name -> the reward's features; `scores` gives each reward's own score.

    Args:
        rewards: names (see `load_reward`) with their weights, or rewards.
        weights: one finite number a reward, where `rewards` is a sequence; all 1 where it is None.
        models: hub id or folder by name, for rewards given by name; the published model for the others.
        device, dtype: for rewards given by name.

    Raises:
        ValueError: no rewards, a name twice, or weights that do not fit.
    """

    def __init__(
        self,
        rewards: Mapping[str, float] | Sequence[Reward],
        weights: Sequence[float] | None = None,
        models: Mapping[str, str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if isinstance(rewards, Mapping):
            if weights is not None:
                raise ValueError(
                    f"weights are in the mapping of rewards already, got weights={list(weights)} as well."
                )
            check_keys("models", models or {}, rewards)
            weights = list(rewards.values())
            rewards = [load_reward(name, (models or {}).get(name), device, dtype) for name in rewards]
        elif models:
            raise ValueError(f"models are for rewards given by name, got models={dict(models)} with loaded rewards.")
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a mixture needs one or more rewards of different names, got {names}.")
        if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"a mixture of {names} needs {len(names)} finite weights, got {weights}.")
        super().__init__("mixture", rewards[0].device)
        self.rewards = dict(zip(names, rewards, strict=True))
        self.weights = dict(zip(names, weights, strict=True))

    def to(self, device: str | torch.device) -> "Mixture":
        for reward in self.rewards.values():
            reward.to(device)
        return super().to(device)

    def features(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """name -> features of that reward."""
        return {name: reward.features(images_BCHW) for name, reward in self.rewards.items()}

    def scores(self, features: Features, target_features: Features) -> dict[str, torch.Tensor]:
        """name -> score of that reward (B,), without its weight.

        Raises:
            ValueError: features of a reward are missing, or do not fit.
        """
        for given in (features, target_features):
            check_keys("mixture", self.rewards, given)
        return {
            name: reward.similarity(features[name], target_features[name]) for name, reward in self.rewards.items()
        }

    def similarity(self, features: Features, target_features: Features) -> torch.Tensor:
        """Σ weight · score, float32 (B,)."""
        scores = self.scores(features, target_features)
        return sum(self.weights[name] * score.to(self.device) for name, score in scores.items())


def check_keys(what: str, needed: Mapping, given: Mapping) -> None:
    """Raises ValueError if a key of `needed` is not in `given`."""
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{what}: {missing} not found among {list(given)}.")
