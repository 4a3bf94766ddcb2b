"""Rewards: how much a preview looks like its target.

    reward = load_reward("depth", model="zoo/depth")
    target_features = reward.features(target_images)            # once, when the dataset is built
    scores = reward.similarity(reward.features(images), target_features)

Eight rewards, a file each kind, with the published models as defaults and the published scales;
`rewards.mixture` adds them up.
"""

from importlib import import_module

import torch

from rewards.base import Reward

REWARDS = {
    "depth": "rewards.depth.DepthReward",  # PSNR of depth maps, ≤ 80 dB
    "dino": "rewards.dino.DinoReward",  # class token, (cos + 1) · 50
    "dino_patches": "rewards.dino.DinoPatchReward",  # patch tokens, (cos + 1) · 50
    "clip": "rewards.clip.ClipReward",  # image embedding, (cos + 1) · 50
    "segmentation": "rewards.segmentation.SegmentationReward",  # % of pixels with the same label
    "inception": "rewards.inception.InceptionReward",  # logits, (cos + 1) · 50
    "pixels": "rewards.pixels.PixelReward",  # PSNR of RGB, ≤ 100 dB
    "ssim": "rewards.ssim.SSIMReward",  # structural similarity of RGB, %
}

__all__ = ["REWARDS", "Reward", "load_reward"]


def load_reward(
    name: str, model: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Reward:
    """Makes a reward from its name.

    Args:
        name: a key of `REWARDS`, or the dotted path of a class that takes `model`, `device` and `dtype`.
        model: hub id or local folder of its network; the published one where it is None.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: there is no such reward, or `model` is of the wrong kind.
        OSError: `model` is missing or incomplete.
    """
    path = REWARDS.get(name, str(name))
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ValueError(
            f"unknown reward {name!r}: choose from {', '.join(REWARDS)}, or give the dotted path of a class."
        )
    try:
        reward_class = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward {name!r} cannot be imported: {error}. The short names are {', '.join(REWARDS)}."
        ) from error
    if not callable(reward_class):
        raise ValueError(f"reward {name!r} is no class. The short names are {', '.join(REWARDS)}.")
    return reward_class(model=model, device=device, dtype=dtype)
