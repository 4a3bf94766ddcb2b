"""The zoo's miniatures as rewards: trained networks must notice damage, and more of it more."""

from pathlib import Path

import pytest
import torch
from tiny_networks import blurred, noisy, shifted

from rewards import load_reward

ZOO = Path(__file__).parents[2] / "zoo"
MAXIMUM = {"depth": 80, "segmentation": 100, "clip": 100, "dino": 100, "dino_patches": 100}
FOLDERS = {"dino_patches": "dino"}  # where it is not the name

every_miniature = pytest.mark.parametrize("name", MAXIMUM)


@pytest.fixture(scope="module")
def scenes():
    """32 unseen scenes, (32, 3, 64, 64) in [0, 1]."""
    from data.scenes import Scene, render_batch

    return render_batch([Scene.random(seed, split="test") for seed in range(32)], 64).image.float() / 255


@pytest.fixture(scope="module")
def miniature():
    rewards = {}

    def get(name):
        if name not in rewards:
            rewards[name] = load_reward(name, model=ZOO / FOLDERS.get(name, name))
        return rewards[name]

    return get


@every_miniature
def test_the_same_picture_scores_the_maximum(name, miniature, scenes):
    scores = miniature(name)(scenes, target_images=scenes)
    torch.testing.assert_close(scores, torch.full((32,), float(MAXIMUM[name])), atol=1e-3, rtol=0)


@every_miniature
def test_another_scene_scores_less_than_a_little_noise(name, miniature, scenes):
    reward = miniature(name)
    targets = reward.features(scenes)
    near, far = (reward.similarity(reward.features(x), targets) for x in (noisy(scenes, 0.01), scenes.roll(1, 0)))
    assert far.mean() < near.mean()


@every_miniature
@pytest.mark.parametrize(
    "worsen, amounts", [(noisy, [0.02, 0.08, 0.3]), (blurred, [0.5, 1.5, 4]), (shifted, [1, 2, 4])]
)
def test_more_damage_scores_less(name, worsen, amounts, miniature, scenes):
    """The mean over 32 scenes falls with every amount.

    Shifts stay within half a patch of 8: a transformer hardly notices a shift by a whole patch.
    """
    reward = miniature(name)
    targets = reward.features(scenes)
    means = [reward.similarity(reward.features(worsen(scenes, x)), targets).mean().item() for x in amounts]
    assert MAXIMUM[name] > means[0] > means[1] > means[2]
