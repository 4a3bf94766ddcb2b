"""Pictures, and the tiny networks of `tiny_networks`, each written and loaded once a run."""

import pytest
import torch
import torch.nn.functional as F
from tiny_networks import NETWORKS


@pytest.fixture(scope="session")
def pictures():
    """Smooth random colour fields with hard-edged squares, (16, 3, 64, 64) in [0, 1], in steps of 1/255."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, size=(64, 64), mode="bilinear", align_corners=False)
    images[:, :, 16:40, 20:44] = torch.rand(16, 3, 1, 1, generator=generator)
    return (images * 255).round() / 255


@pytest.fixture(scope="session")
def network_folder(tmp_path_factory):
    """Key of NETWORKS -> its folder, written at the first call."""
    folders = {}

    def get(key):
        if key not in folders:
            torch.manual_seed(0)
            folders[key] = tmp_path_factory.mktemp(key)
            NETWORKS[key][1](folders[key])
        return str(folders[key])

    return get


@pytest.fixture(scope="session")
def load_tiny(network_folder):
    """Key of NETWORKS -> the reward on that network, loaded once. Not to be changed."""
    from rewards import load_reward

    rewards = {}

    def get(key):
        if key not in rewards:
            rewards[key] = load_reward(NETWORKS[key][0], model=network_folder(key))
        return rewards[key]

    return get
