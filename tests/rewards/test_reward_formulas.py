"""Scores derived by hand: known errors, known labels, known angles."""

import math

import pytest
import torch
from tiny_networks import blurred, noisy, shifted

from rewards import load_reward
from rewards.networks import CosineReward

LEVEL = 1 / 255


def flat(value, size=(8, 8)):
    return torch.full((2, 3, *size), value)


def test_pixels_of_a_known_error():
    """51 levels of 255 everywhere are an error of 0.2, so MSE 0.04 and 10 log10(25) = 13.979 dB."""
    score = load_reward("pixels")(flat(102 * LEVEL), target_images=flat(153 * LEVEL))
    torch.testing.assert_close(score, torch.full((2,), 10 * math.log10(25)), atol=1e-4, rtol=0)


def test_pixels_one_level_in_one_value():
    """The smallest error there is: one value of N = 192 off by 1/255 gives 10 log10(255² · 192)."""
    images = flat(100 * LEVEL)
    images[0, 1, 2, 3] += LEVEL
    score = load_reward("pixels")(images, target_images=flat(100 * LEVEL))
    assert score[0].item() == pytest.approx(10 * math.log10(255**2 * 192), abs=1e-3)
    assert score[1] == 100


def test_pixels_ends_of_the_scale():
    pixels = load_reward("pixels")
    assert pixels(flat(0.0), target_images=flat(1.0)).tolist() == [0, 0]  # MSE 1
    assert pixels(flat(0.3), target_images=flat(0.3)).tolist() == [100, 100]


def test_ssim_against_the_definition():
    """Moments of 11 x 11 Gaussian windows, in float64 by scipy."""
    from scipy.ndimage import gaussian_filter

    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    targets = (0.7 * images + 0.3 * images.roll(1, -1)).mul(255).round() / 255

    def mean(plane):
        return gaussian_filter(plane, 1.5, radius=5)[5:-5, 5:-5]

    scores = []
    for x, y in zip(images.double().flatten(0, 1).numpy(), targets.double().flatten(0, 1).numpy(), strict=True):
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        value = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        scores.append(value.mean())
    expected = 100 * torch.tensor(scores).view(2, 3).mean(dim=1)
    ssim = load_reward("ssim")(images, target_images=targets)
    torch.testing.assert_close(ssim, expected.float(), atol=1e-3, rtol=0)
    assert (ssim > 10).all() and (ssim < 99).all()


def test_ssim_ends_of_the_scale():
    board = torch.zeros(1, 3, 16, 16)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1
    ssim = load_reward("ssim")
    assert ssim(board, target_images=board).item() == pytest.approx(100, abs=1e-3)
    assert ssim(board, target_images=1 - board).item() < -95  # the opposite everywhere
    # Flat pictures differ in luminance only: (2 · 0.2 · 0.6 + C1) / (0.2² + 0.6² + C1).
    score = ssim(flat(51 * LEVEL, (16, 16)), target_images=flat(153 * LEVEL, (16, 16)))
    torch.testing.assert_close(score, torch.full((2,), 100 * 0.2401 / 0.4001), atol=1e-2, rtol=0)


def test_ssim_of_a_picture_smaller_than_its_window():
    with pytest.raises(ValueError, match="windows of 11 pixels; 8x8"):
        load_reward("ssim")(flat(0.1), target_images=flat(0.2))


def test_images_are_compared_in_eight_bits():
    """A target read back from a PNG file and a preview that never was in one are the same picture."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    from_file = (images * 255).round().to(torch.uint8).float() / 255
    assert load_reward("pixels")(images, target_images=from_file).tolist() == [100] * 4


def test_depth_of_a_known_error(load_tiny):
    """Half the pixels off by 0.5: MSE 1/8. Everything off by 1: 0 dB, not below. Equal: 10 log10(1 / 1e-8) = 80."""
    target = torch.zeros(3, 4, 4, dtype=torch.float16)
    features = target.clone()
    features[0, :2] = 0.5
    features[1] = 1
    expected = torch.tensor([10 * math.log10(8), 0, 80])
    torch.testing.assert_close(load_tiny("smp-depth").similarity(features, target), expected, atol=1e-4, rtol=0)


def test_depth_is_normalised_image_by_image(load_tiny):
    """Scale and shift of a map do not matter, those of its neighbours neither; a flat map is 0, not NaN."""
    depth = load_tiny("smp-depth")
    ramp = torch.arange(64.0).reshape(1, 8, 8)
    maps = torch.cat([ramp, 5 * ramp - 100, torch.full((1, 8, 8), 7.0)])
    features = depth._encode(maps, torch.Size([8, 8])).float()
    torch.testing.assert_close(features[0], ramp[0] / 63, atol=3e-4, rtol=0)
    assert features[0].equal(features[1])
    assert features[2].eq(0).all()


def test_segmentation_counts_labels(load_tiny):
    """16 pixels: 4 flipped leave 75 %, all flipped 0 %."""
    target = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4).repeat(3, 1, 1)
    labels = target.clone()
    labels[1, 0] = 48
    labels[2] += 1
    assert load_tiny("smp-segmentation").similarity(labels, target).tolist() == [100, 75, 0]


@pytest.mark.parametrize("angle, score", [(0, 100), (60, 75), (90, 50), (120, 25), (180, 0)])
def test_cosine_of_a_known_angle(angle, score):
    """(cos + 1) · 50, whatever the lengths."""
    radians = math.radians(angle)
    features = 3 * torch.tensor([[math.cos(radians), math.sin(radians)]])
    scores = CosineReward._similarity(None, features, torch.tensor([[0.5, 0.0]]))
    assert scores.item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    "worsen, amounts", [(noisy, [0.01, 0.05, 0.1, 0.2, 0.4]), (blurred, [0.5, 1, 2, 4]), (shifted, [1, 2, 4, 8])]
)
def test_pixels_fall_with_every_damage(pictures, worsen, amounts):
    scores = [load_reward("pixels")(worsen(pictures, amount), target_images=pictures) for amount in amounts]
    means = [100.0] + [score.mean().item() for score in scores]
    assert means == sorted(means, reverse=True) and len(set(means)) == len(means)
