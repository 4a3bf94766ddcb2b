"""The mixture: a plain weighted sum, and nothing lost on the way."""

import pytest
import torch

from rewards.mixture import Mixture


@pytest.fixture
def mixture(load_tiny):
    return Mixture([load_tiny("smp-depth"), load_tiny("timm-vit")], [1.0, 0.5])


def test_weighted_sum(mixture, load_tiny, pictures):
    """Not normalised: 1 · depth + 0.5 · dino; identical pictures score 80 + 50."""
    images, targets = pictures[:3], pictures[3:6]
    depth, dino = (load_tiny(key)(images, target_images=targets) for key in ("smp-depth", "timm-vit"))
    torch.testing.assert_close(mixture(images, target_images=targets), depth + 0.5 * dino)
    torch.testing.assert_close(mixture(images, target_images=images), torch.full((3,), 130.0), atol=1e-4, rtol=0)


def test_scores_of_each(mixture, load_tiny, pictures):
    features, targets = mixture.features(pictures[:3]), mixture.features(pictures[3:6])
    assert list(features) == ["depth", "dino"]
    scores = mixture.scores(features, targets)
    assert scores["dino"].equal(load_tiny("timm-vit")(pictures[:3], target_images=pictures[3:6]))
    assert mixture(pictures[:3], target_features=targets, seed=[1, 2, 3]).equal(mixture.similarity(features, targets))


def test_by_name(network_folder, pictures):
    mixture = Mixture({"pixels": 2.0, "depth": 1.0}, models={"depth": network_folder("smp-depth")})
    assert mixture.weights == {"pixels": 2.0, "depth": 1.0} and mixture.__name__ == "mixture"
    assert mixture(pictures[:2], target_images=pictures[:2]).tolist() == [280, 280]


def test_errors(mixture, load_tiny, pictures):
    depth = load_tiny("smp-depth")
    with pytest.raises(ValueError, match=r"\['depth', 'depth'\]"):
        Mixture([depth, depth])
    with pytest.raises(ValueError, match=r"\[1\.0, 2\.0\]"):
        Mixture([depth], [1.0, 2.0])
    with pytest.raises(ValueError, match="nan"):
        Mixture([depth], [float("nan")])
    with pytest.raises(ValueError, match="one or more"):
        Mixture([])
    with pytest.raises(ValueError, match="unknown reward 'dept'"):
        Mixture({"dept": 1.0})
    with pytest.raises(ValueError, match="dino"):
        Mixture({"pixels": 1.0}, models={"dino": "zoo/dino"})
    with pytest.raises(ValueError, match="models"):
        Mixture([depth], models={"depth": "zoo/depth"})
    with pytest.raises(ValueError, match="dino"):
        mixture.similarity(mixture.features(pictures[:1]), {"depth": depth.features(pictures[:1])})
