"""Everything that looks at pictures, in one place: rewards, caption check, ranking score, Inception.

Shape suffixes: B, N images.
"""

from collections.abc import Sequence

import torch

from evaluation.cache import fingerprint
from evaluation.metrics import ClipScorer, InceptionFeatures, caption_check
from rewards import Reward

CAPTION_CHECK, SCORE, FID = "caption_check", "score", "fid"


class Instruments:
    """What is seen in pictures, by name.

    Args:
        rewards: each sees its features.
        checker: segmentation reward whose labels are checked against the prompts, seen as `caption_check`.
        scorer: CLIP model that scores a picture by its prompt, seen as `score`.
        inception: seen as `fid`.
    """

    def __init__(
        self,
        rewards: Sequence[Reward] = (),
        checker: Reward | None = None,
        scorer: ClipScorer | None = None,
        inception: InceptionFeatures | None = None,
    ):
        self.rewards = {reward.name: reward for reward in rewards}
        if len(self.rewards) < len(rewards):
            raise ValueError(f"rewards {[reward.name for reward in rewards]}: each can be used only once.")
        self.checker, self.scorer, self.inception = checker, scorer, inception
        self.identity = {
            "rewards": {name: _identity(reward) for name, reward in self.rewards.items()},
            "checker": checker and _identity(checker),
            "scorer": scorer and _identity(scorer.reward),
            "inception": inception is not None,
        }

    def look(self, images_NCHW: torch.Tensor, prompts: Sequence[str], batch_size: int) -> dict[str, torch.Tensor]:
        """What is seen in pictures, float (N, 3, H, W) in [0, 1]: tensors (N, ...) on the CPU."""
        batches = [slice(first, first + batch_size) for first in range(0, len(images_NCHW), batch_size)]
        seen = [self._look(images_NCHW[batch], list(prompts[batch])) for batch in batches]
        return {name: torch.cat([part[name] for part in seen]) for name in seen[0]}

    def _look(self, images_BCHW: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        seen = {name: reward.features(images_BCHW).cpu() for name, reward in self.rewards.items()}

        def features(reward: Reward) -> torch.Tensor:
            known = reward is self.rewards.get(reward.name)
            return seen[reward.name] if known else reward.features(images_BCHW)

        if self.checker:
            seen[CAPTION_CHECK] = caption_check(features(self.checker), prompts)
        if self.scorer:
            seen[SCORE] = self.scorer(features(self.scorer.reward), prompts)
        if self.inception:
            seen[FID] = self.inception(images_BCHW)
        return seen

    def compare(self, seen: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Similarity by reward, float32 (N,), between what was seen in previews and in full-step pictures."""
        return {name: reward.similarity(seen[name], target[name]).cpu() for name, reward in self.rewards.items()}


def _identity(reward: Reward) -> list:
    network = getattr(reward, "network", None)
    return [type(reward).__name__, getattr(reward, "model", None), network and fingerprint(network)]
