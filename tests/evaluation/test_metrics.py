"""Fréchet distances, ranks and the caption check, on data whose answer is known."""

import random

import pytest
import torch
from scipy.stats import spearmanr

from data.scenes import Scene, caption, render
from evaluation.metrics import caption_check, frechet, frechet_distance, spearman, top1_agreement


def white(count, features, seed=0):
    """Points whose mean is 0 and whose covariance is the identity, exactly."""
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (count - 1) ** 0.5


def test_frechet_distance_of_known_gaussians():
    x, y = white(200, 6), white(150, 6, seed=1)
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y + 2) == pytest.approx(6 * 4)
    assert frechet_distance(x, y * scale) == pytest.approx(float((scale - 1).square().sum()))
    assert frechet_distance(y * scale, x) == pytest.approx(float((scale - 1).square().sum()))


def test_frechet_distance_with_fewer_images_than_features():
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(x, x + 1) == pytest.approx(9)
    padded = torch.cat([x, x]), torch.cat([2 * x, 2 * x])  # more rows than features: the other way of computing it
    tall = torch.nn.functional.pad(x, (0, 0))
    weights = torch.full((10,), 0.1, dtype=torch.float64)
    ratio = (10 / 9) / (5 / 4)  # of the two unbiased covariances
    mean_part = float(x.mean(0).square().sum())
    few, many = frechet_distance(tall, 2 * tall) - mean_part, frechet_distance(*padded, weights, weights) - mean_part
    assert many == pytest.approx(ratio * few)


def test_weights_are_repetitions():
    x, y = white(40, 3), white(40, 3, seed=1) * 2
    drawn = torch.randint(40, (40,), generator=torch.Generator().manual_seed(2))
    weights = torch.bincount(drawn, minlength=40).double() / 40
    assert frechet_distance(x, y, weights) == pytest.approx(frechet_distance(x[drawn], y))


def test_paired_frechet_is_sharper():
    x = white(120, 4)
    near = x + 0.01 * white(120, 4, seed=1)
    paired, apart = frechet(near, x, paired=True), frechet(near, x, paired=False)
    assert paired.value == apart.value
    assert paired.ci95[1] - paired.ci95[0] < apart.ci95[1] - apart.ci95[0]


def test_rank_correlation():
    x = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 3], [5, 5, 5, 5], [0.1, 0.4, 0.2, 0.3]])
    y = torch.tensor([[10.0, 20, 30, 99], [4, 3, 2, 1], [3, 1, 2, 9], [1, 2, 3, 4], [1, 3, 4, 2]])
    expected = [1, -1, spearmanr(x[2], y[2]).statistic, 0, spearmanr(x[4], y[4]).statistic]
    assert spearman(x, y).tolist() == pytest.approx(expected)
    assert top1_agreement(x, y).tolist() == [1, 0, 1, 0, 0]


def test_caption_check_of_drawn_scenes():
    scenes = [Scene.random(seed, "test") for seed in range(6)]
    words = [caption(scene, random.Random(0)).text for scene in scenes]
    labels = torch.stack([torch.as_tensor(render(scene, 128).segmentation) for scene in scenes])
    assert caption_check(labels, words).tolist() == [1.0] * 6
    assert caption_check(labels.roll(1, 0), words).sum() < 6
    assert caption_check(torch.zeros_like(labels), words).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="miniature world"):
        caption_check(labels[:1], ["an astronaut on a horse"])
