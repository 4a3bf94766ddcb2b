"""Intervals of means and of paired differences."""

import pytest
import torch

from evaluation.bootstrap import Estimate, mean, resample_weights, statistic


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    trials, count = 400, 60
    samples = normal(trials, count)
    inside = [low <= 0 <= high for low, high in (mean(x, 500, seed).ci95 for seed, x in enumerate(samples))]
    assert 0.91 <= sum(inside) / trials <= 0.975  # 0.95 less what percentiles lose at 60; three standard errors


def test_width_is_that_of_the_central_limit():
    low, high = mean(normal(1000), 4000).ci95
    assert high - low == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.1)


def test_seed_fixes_the_interval_and_weights_are_a_resample():
    values = normal(30)
    assert mean(values, 100, seed=1).ci95 == mean(values, 100, seed=1).ci95 != mean(values, 100, seed=2).ci95
    weights = resample_weights(7, 50)
    assert torch.allclose(weights.sum(1), torch.ones(50, dtype=torch.float64))
    assert torch.equal((weights * 7).round(), weights * 7)


def test_paired_difference_has_its_sign_and_is_sharper_than_two_intervals():
    prompts = 5 * normal(200, seed=1)  # prompts differ far more than solvers do
    a, b = prompts + 0.5 + 0.1 * normal(200, seed=2), prompts
    difference = mean(a) - mean(b)
    low, high = difference.ci95
    assert difference.value == pytest.approx(float((a - b).mean()))
    assert 0.4 < low < 0.5 < high < 0.6
    assert (mean(b) - mean(a)).ci95 == pytest.approx([-high, -low])
    assert mean(a).ci95[0] < mean(b).ci95[1]  # unpaired, nothing could be said


def test_equal_values_differ_by_nothing():
    values = normal(50)
    assert (mean(values) - mean(values)).ci95 == [0.0, 0.0]


def test_differently_resampled_estimates_do_not_pair():
    with pytest.raises(ValueError, match="10 and 20 resamples"):
        mean(normal(5), 10) - mean(normal(5), 20)
    with pytest.raises(ValueError, match="on 5 and 6 prompts"):
        mean(normal(5), 10) - mean(normal(6), 10)


def test_interval_of_a_set_statistic_is_centred():
    x = normal(300)
    variance = statistic(lambda w: float(w @ (x - w @ x).square()), 300)
    low, high = variance.ci95
    assert (low + high) / 2 == pytest.approx(variance.value) == pytest.approx(float(x.var(correction=0)))
    assert high - low == pytest.approx(2 * 1.96 * (2 / 300) ** 0.5, rel=0.4)
    assert (Estimate(1.0, torch.ones(5)) - Estimate(0.5, torch.ones(5), centred=True)).centred
