"""The filter and the alignment rules, against their formulas."""

import itertools
import math

import pytest
import torch

from solver.samplers.hiflow.alignment import (
    StageAlignment,
    Trajectory,
    accelerate,
    align_direction,
    enlarge,
    sharpen,
)
from solver.samplers.hiflow.lowpass import butterworth_mask, lowpass

K = 16
SIGMAS = torch.linspace(0.8, 0.0, K + 1, dtype=torch.float64).tolist()
RAMP = tuple((K - k) / K for k in range(K))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- filter ----


def test_mask_is_one_at_dc_half_at_the_cutoff_and_falls_with_the_eighth_power():
    mask = butterworth_mask(40, 40, cutoff=0.2)
    assert mask.shape == (40, 21)
    assert mask[0, 0] == 1
    # Bin 4 of 40 has d = 0.2, bin 8 twice that: 1 / (1 + 2^8).
    torch.testing.assert_close(mask[4, 0], torch.tensor(0.5))
    torch.testing.assert_close(mask[0, 8], torch.tensor(1 / 257))
    assert torch.equal(mask[4, :], mask[-4, :])


def test_mask_of_an_odd_size_is_centred():
    mask = butterworth_mask(9, 7, cutoff=0.5)
    assert mask[0, 0] == mask.max() == 1
    assert torch.equal(mask[1:], mask[1:].flip(0))


def test_mask_equals_the_public_formula_on_even_sizes():
    """d² = (2h/H - 1)² + (2w/W - 1)² on the shifted spectrum."""
    h, w = torch.arange(12.0)[:, None], torch.arange(8.0)[None, :]
    d2 = (2 * h / 12 - 1) ** 2 + (2 * w / 8 - 1) ** 2
    centred = 1 / (1 + (d2 / 0.3**2) ** 4)
    torch.testing.assert_close(butterworth_mask(12, 8, 0.3), torch.fft.ifftshift(centred)[:, :5])


@pytest.mark.parametrize("size", [(16, 16), (15, 22)])
def test_lowpass_keeps_the_mean_is_linear_and_passes_low_frequencies(size):
    x, y = randn(2, 3, *size), randn(2, 3, *size, seed=1)
    torch.testing.assert_close(lowpass(x, 0.2).mean((-2, -1)), x.mean((-2, -1)))
    torch.testing.assert_close(lowpass(2 * x - y, 0.2), 2 * lowpass(x, 0.2) - lowpass(y, 0.2))
    torch.testing.assert_close(lowpass(x, math.inf), x)
    checkers = torch.ones(16, 16)
    checkers[::2, 1::2] = checkers[1::2, ::2] = -1
    assert lowpass(checkers, 0.2).abs().max() < 1e-5


@pytest.mark.parametrize("cutoff", [0, -0.2, math.nan])
def test_cutoff_must_be_positive(cutoff):
    with pytest.raises(ValueError, match="cutoff"):
        lowpass(randn(1, 1, 4, 4), cutoff)


# ---- pixels ----


def test_enlarging_keeps_positions():
    """The two pixels that cover an old one average to it on a ramp; mirrored in, mirrored out."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    row = enlarge(ramp, 16, 16)[0, 0, 8]
    torch.testing.assert_close(row.unflatten(0, (8, 2)).mean(1)[2:6], torch.arange(2.0, 6.0))
    x = randn(1, 2, 6, 8)
    torch.testing.assert_close(enlarge(x.flip(-1), 9, 12), enlarge(x, 9, 12).flip(-1))


def test_sharpening_keeps_flat_areas_and_steepens_edges():
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(sharpen(flat), flat)
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    side = math.exp(-0.5 / 1.05**2)
    overshoot = side / (1 + 2 * side)
    torch.testing.assert_close(sharpen(edge)[0, 0, 4, 3:5], torch.tensor([-overshoot, 1 + overshoot]))


# ---- rules ----


def euler_in_velocities(reference, network, x, alphas, betas, cutoff, change_of_reference, printed):
    """Steps 3 to 9 as the public code takes them: velocities, no recursion. `printed` keeps v of Eq. 13, not v̂."""
    last_v = last_w = None
    for k, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
        X, R = network(x, k), reference[k]
        D = X + alphas[k] * (lowpass(R, cutoff) - lowpass(X, cutoff))
        v, w = (x - D) / sigma, change_of_reference(x, R, sigma)
        corrected = v if k == 0 else v + betas[k] * (last_v + w - last_w - v)
        x = x + (following - sigma) * corrected
        last_v, last_w = v if printed else corrected, w
    return x


def euler_in_predictions(reference, network, x, alphas, betas, cutoff, rule):
    previous = None
    for k, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
        aligned = align_direction(network(x, k), reference[k], alphas[k], cutoff)
        corrected = accelerate(aligned, reference[k], previous, betas[k], sigma, rule)
        previous = (aligned if rule == "eq13" else corrected, reference[k], sigma)
        x = x + (following - sigma) * (x - corrected) / sigma
    return x


@pytest.mark.parametrize("rule", ["code", "eq13", "fixed-noise"])
def test_recursion_equals_the_velocity_form(rule):
    reference = [randn(2, 4, 8, 8, seed=k) for k in range(K)]
    noise = randn(2, 4, 8, 8, seed=98)
    weights = [randn(4, 4, seed=100 + k) / 3 for k in range(K)]

    def network(x, k):
        return torch.tanh(torch.einsum("ij,bjhw->bihw", weights[k], x))

    def reference_velocity(x, R, sigma):
        return noise - R if rule == "fixed-noise" else (x - R) / sigma

    x = randn(2, 4, 8, 8, seed=99)
    betas = tuple(0.5 * value for value in RAMP)
    expected = euler_in_velocities(reference, network, x, RAMP, betas, 0.2, reference_velocity, rule == "eq13")
    got = euler_in_predictions(reference, network, x, RAMP, betas, 0.2, rule)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_eq10_equals_its_velocity_form():
    """The change of the reference velocity as Eq. 10 has it, -ΔX_0 / (σ Δσ) times Δσ; v' = v + β (v̂ + that - v)."""
    aligned, reference = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    last, last_reference = randn(1, 1, 4, 4, seed=2), randn(1, 1, 4, 4, seed=3)
    last_sigma, sigma, beta = 0.7, 0.6, 0.3
    last_x = randn(1, 1, 4, 4, seed=4)
    last_v = (last_x - last) / last_sigma
    x = last_x + (sigma - last_sigma) * last_v
    v = (x - aligned) / sigma
    corrected = v + beta * (last_v - (reference - last_reference) / sigma - v)
    got = accelerate(aligned, reference, (last, last_reference, last_sigma), beta, sigma, "eq10")
    torch.testing.assert_close(got, x - sigma * corrected, rtol=0, atol=1e-12)


def test_limits_of_the_rules():
    X, R = randn(1, 2, 8, 8), randn(1, 2, 8, 8, seed=1)
    assert torch.equal(align_direction(X, R, 0.0, 0.2), X)
    torch.testing.assert_close(align_direction(X, R, 1.0, math.inf), R)
    torch.testing.assert_close(align_direction(X, X, 1.0, 0.2), X)
    previous = (R, R, 0.8)
    assert torch.equal(accelerate(X, R, None, 1.0, 0.5), X)
    assert torch.equal(accelerate(X, R, previous, 0.0, 0.5), X)
    # At full memory the residual of the step before stays, shrunk by the ratio of the noise levels.
    torch.testing.assert_close(accelerate(X, R, (X, R, 0.8), 1.0, 0.4), R + 0.5 * (X - R))
    torch.testing.assert_close(accelerate(X, R, (X, R, 0.8), 1.0, 0.4, "eq10"), X)
    with pytest.raises(ValueError, match="eq11"):
        accelerate(X, R, previous, 0.5, 0.5, "eq11")


def test_memory_of_the_newest_residuals():
    """The public ladder at 2K, step 5: weights of the residuals 0.66, 0.21, 0.07, 0.03, 0.01, newest first."""
    sigmas = [0.783, 0.760, 0.734, 0.707, 0.678, 0.646]
    zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for age, weight in enumerate([0.66, 0.21, 0.07, 0.03, 0.01]):
        previous = None
        for k, sigma in enumerate(sigmas):
            aligned = one if k == 5 - age else zero
            corrected = accelerate(aligned, zero, previous, 0.5 * RAMP[k], sigma)
            previous = (corrected, zero, sigma)
        assert corrected.mean() == pytest.approx(weight, abs=0.006)


def test_eq13_remembers_one_residual():
    """A stage whose first prediction alone leaves its reference: the code's rule never quite forgets it."""
    zero = torch.zeros(1, 1, 4, 4)
    for rule, tells in (("code", [True, True, True]), ("eq13", [True, True, False])):
        stage = StageAlignment(Trajectory({0.5: zero}), (0.0,) * 3, (0.5,) * 3, rule=rule)
        left = [stage(zero + (k == 0), s).mean().item() for k, s in enumerate((0.8, 0.6, 0.4))]
        assert [abs(value) > 0.01 for value in left] == tells


# ---- references ----


def test_trajectory_reads_exactly_what_was_written_and_interpolates_between():
    trajectory = Trajectory({0.8: torch.tensor([8.0]), 0.4: torch.tensor([4.0])})
    assert trajectory.at(0.8) == 8 and trajectory.at(0.4) == 4
    assert trajectory.at(0.5).item() == pytest.approx(5)
    assert trajectory.at(0.9) == 8 and trajectory.at(0.1) == 4
    assert Trajectory({0.0: torch.tensor([3.0])}).at(0.7) == 3
    with pytest.raises(ValueError, match="reference"):
        Trajectory().at(0.5)


def test_a_stage_reads_the_stage_before_and_leaves_its_own_raw_predictions():
    base, large = StageAlignment(), None
    small = {s: randn(1, 4, 4, 4, seed=int(10 * s), dtype=torch.float32) for s in (0.9, 0.6, 0.3)}
    for s, x0 in small.items():
        assert torch.equal(base(x0, s), x0)
    large = StageAlignment(base.predictions, alphas=(1.0, 0.5), betas=(0.5, 0.25), cutoff=0.5)
    raw = {s: randn(1, 4, 8, 8, seed=20 + i, dtype=torch.float32) for i, s in enumerate((0.6, 0.3))}
    first = large(raw[0.6], 0.6)
    torch.testing.assert_close(lowpass(first, 0.1), lowpass(enlarge(small[0.6], 8, 8), 0.1), atol=1e-4, rtol=0)
    second = large(raw[0.3], 0.3)
    R = enlarge(small[0.3], 8, 8)
    D = align_direction(raw[0.3], R, 0.5, 0.5)
    torch.testing.assert_close(second - R, 0.75 * (D - R) + 0.125 * (first - enlarge(small[0.6], 8, 8)))
    assert list(large.predictions.entries) == [0.6, 0.3]
    assert all(torch.equal(large.predictions.at(s), raw[s]) for s in raw)


def test_no_strength_changes_nothing():
    reference = Trajectory({0.5: randn(1, 4, 4, 4, dtype=torch.float32)})
    stage = StageAlignment(reference, alphas=(0.0,), betas=(0.0,))
    x0 = randn(1, 4, 8, 8, seed=1, dtype=torch.float32)
    assert torch.equal(stage(x0, 0.5), x0)


# ---- a model whose flow is known ----


def oracle(x, sigma, scale):
    """E[x_0 | x_σ] of random fields with the spectrum 1 / f³ of the small image, drawn `scale` times as large."""
    size = x.shape[-1]
    f = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]) * scale
    spectrum = scale**2 * 0.002 / (f + 0.02) ** 3
    gain = (1 - sigma) * spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2)
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(size, size))


def euler(x, sigmas, scale, stage):
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * (x - stage(oracle(x, sigma, scale), sigma)) / sigma
    return x


def test_the_large_field_has_the_low_band_of_the_small_one():
    steps = 16
    sigmas = torch.linspace(1, 0, 31).tolist()
    small_noise, large_noise = (randn(64, 1, n, n, seed=n, dtype=torch.float32) for n in (16, 32))
    base = StageAlignment()
    small = enlarge(euler(small_noise, sigmas, 1, base), 32, 32)
    tail, ramp = sigmas[-steps - 1 :], [(steps - k) / steps for k in range(steps)]
    started = tail[0] * large_noise + (1 - tail[0]) * small

    def correlation(large):
        bands = torch.stack(
            [lowpass(field - field.mean((-2, -1), keepdim=True), 0.2).flatten() for field in (large, small)]
        )
        return torch.corrcoef(bands)[0, 1].item()

    none = correlation(euler(large_noise, sigmas, 2, StageAlignment()))
    init = correlation(euler(started, tail, 2, StageAlignment()))
    full = StageAlignment(base.predictions, ramp, [0.5 * a for a in ramp], 0.2)
    large = euler(started, tail, 2, full)
    assert abs(none) < 0.1 and init > 0.8  # -0.02 and 0.88 when this was written
    assert correlation(large) > 0.97, correlation(large)
    # From noise alone the other two alignments do not bring all of it back: 0.987 and 0.937 when this was written.
    again = StageAlignment(base.predictions, ramp, [0.5 * a for a in ramp], 0.2)
    assert correlation(euler(large_noise, tail, 2, again)) < correlation(large) - 0.03
    # Above the band that the small one could have, new detail appears.
    assert (large - lowpass(large, 0.6)).std() > 2 * (small - lowpass(small, 0.6)).std()
