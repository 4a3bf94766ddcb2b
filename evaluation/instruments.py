"""Everything that looks at pictures, in one place: rewards, caption check, ranking score, Inception.

Shape suffixes: B, N images.
"""

from collections.abc import Sequence

import torch

from evaluation.cache import fingerprint
from evaluation.metrics import ClipScorer, InceptionFeatures, caption_check, edit_check
from evaluation.rendering import Samples
from rewards import Reward

CAPTION_CHECK, EDIT_CHECK, SCORE, FID = "caption_check", "edit_check", "score", "fid"
CHECKS = (CAPTION_CHECK, EDIT_CHECK)  # whether a picture is what was asked for


class Instruments:
    """What is seen in pictures, by name.

    Args:
        rewards: each sees its features.
        checker: segmentation reward whose labels are checked against the prompts, seen as `caption_check`; or, where
            it is known what edits should lead to, against that, seen as `edit_check`.
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

    def look(self, images_NCHW: torch.Tensor, samples: Samples, batch_size: int) -> dict[str, torch.Tensor]:
        """What is seen in pictures, float (N, 3, H, W) in [0, 1], of N samples: tensors (N, ...) on the CPU."""
        firsts = range(0, len(images_NCHW), batch_size)
        seen = [self._look(images_NCHW[i : i + batch_size], samples.rows(i, i + batch_size)) for i in firsts]
        return {name: torch.cat([part[name] for part in seen]) for name in seen[0]}

    def _look(self, images_BCHW: torch.Tensor, samples: Samples) -> dict[str, torch.Tensor]:
        seen = {name: reward.features(images_BCHW).cpu() for name, reward in self.rewards.items()}

        def features(reward: Reward) -> torch.Tensor:
            known = reward is self.rewards.get(reward.name)
            return seen[reward.name] if known else reward.features(images_BCHW)

        if self.checker and samples.edited:
            scenes = samples.sources, samples.edited
            seen[EDIT_CHECK] = edit_check(images_BCHW, features(self.checker), *scenes)
        elif self.checker:
            seen[CAPTION_CHECK] = caption_check(features(self.checker), list(samples.prompts))
        if self.scorer:
            seen[SCORE] = self.scorer(features(self.scorer.reward), list(samples.prompts))
        if self.inception:
            seen[FID] = self.inception(images_BCHW)
        return seen

    def compare(self, seen: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Similarity by reward, float32 (N,), between what was seen in previews and in full-step pictures."""
        return {name: reward.similarity(seen[name], target[name]).cpu() for name, reward in self.rewards.items()}


def _identity(reward: Reward) -> list:
    network = getattr(reward, "network", None)
    return [type(reward).__name__, getattr(reward, "model", None), network and fingerprint(network)]
