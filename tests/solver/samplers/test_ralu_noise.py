"""Copies and their noise: moments, exact limits, and which latents belong together."""

import pytest
import torch

from solver.samplers.ralu.noise import (
    COPIES,
    block_noise,
    enlarge,
    from_siblings,
    injected_noise,
    on_grid,
    reduce,
    siblings,
    white_noise,
)
from solver.samplers.ralu.schedule import PRESETS, restart


def standard(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("copy", COPIES)
def test_round_trips(copy):
    x = standard(2, 3, 8, 12)
    assert torch.equal(from_siblings(siblings(x, copy), copy), x)
    y = standard(2, 3, 4, 6)
    assert torch.equal(reduce(enlarge(y, copy), copy), y)
    assert torch.equal(siblings(enlarge(y, copy), copy).amax(-1), siblings(enlarge(y, copy), copy).amin(-1))


def test_what_the_two_copies_look_like():
    """A patch [a b; c d]: nearest neighbour, or the whole patch four times."""
    patch = torch.tensor([[[[1.0, 2], [3, 4]]]])
    pixel = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    token = torch.tensor([[1.0, 2, 1, 2], [3, 4, 3, 4], [1, 2, 1, 2], [3, 4, 3, 4]])
    assert torch.equal(enlarge(patch, "pixel")[0, 0], pixel)
    assert torch.equal(enlarge(patch, "token")[0, 0], token)
    y = standard(1, 2, 4, 6)
    nearest = torch.nn.functional.interpolate(y, scale_factor=2, mode="nearest")
    assert torch.equal(enlarge(y, "pixel"), nearest)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("name", ["4x", "2x", "turbo"])
def test_moments_of_restarted_noise(copy, name):
    """a · copies + b · z of pure noise is white of variance (1-s)², in copied and in untouched cells alike."""
    preset = PRESETS[name]
    end = preset.ends[0]
    s, a, b = restart(end, preset.Z)
    fine = torch.zeros(1, 4, 4, dtype=torch.bool)
    fine[:, ::2] = True
    n = 40_000
    old = (1 - end) * enlarge(standard(n // 16, 1, 8, 8, seed=1), copy)
    z = injected_noise(standard(n // 16, 1, 16, 16, seed=2), fine, ~fine, preset.c, copy)
    new = siblings(a * old + b * z, copy)
    copied = new[:, :, ::2].reshape(-1, 4).double()
    covariance = copied.T @ copied / len(copied)
    assert torch.allclose(covariance, (1 - s) ** 2 * torch.eye(4).double(), atol=0.02)
    untouched = new[:, :, 1::2].reshape(-1, 4).double()
    assert torch.equal(untouched.amax(-1), untouched.amin(-1))  # still one token
    assert untouched[:, 0].square().mean().item() == pytest.approx((1 - s) ** 2, abs=0.015)


def test_public_codes_noise_is_too_strong_by_c():
    """Untouched tokens of variance b²(1 + c) instead of b²: 25 % too much at c = 1/4."""
    end, Z = 0.3, 2.0
    _, a, b = restart(end, Z)
    coarse = torch.ones(1, 16, 16, dtype=torch.bool)
    noise = standard(50, 4, 64, 64)
    variances = {}
    for scaled in (True, False):
        z = injected_noise(noise, ~coarse, coarse, 1 / Z**2, "pixel", scaled=scaled)
        total = a * (1 - end) * enlarge(standard(50, 4, 32, 32, seed=3), "pixel") + b * z
        variances[scaled] = total.var().item() / b**2
    assert variances == pytest.approx({True: 1.0, False: 1.25}, rel=0.01)


@pytest.mark.parametrize("copy", COPIES)
def test_limits_of_c(copy):
    """c = 1/4 leaves blocks of mean zero, c = 0 the noise itself."""
    noise = standard(2, 3, 8, 8)
    blocks = siblings(block_noise(noise, 0.25, copy), copy)
    assert blocks.mean(-1).abs().max() < 1e-6 and blocks.std() > 0.5
    assert torch.equal(block_noise(noise, 0.0, copy), noise)
    with pytest.raises(ValueError, match=r"c=0.26.*1/4"):
        block_noise(noise, 0.26, copy)


def test_fine_cells_stay_free_at_the_last_boundary():
    """Cells that were fine before get independent noise, those that are copied now get blocks."""
    noise = standard(1, 1, 8, 8)
    fine = torch.tensor([[[True, False], [False, True]]])
    z = injected_noise(noise, ~fine, torch.zeros_like(fine), 0.25, "pixel")
    assert torch.equal(z[on_grid(fine)], (0.75**0.5 * noise)[on_grid(fine)])
    assert siblings(z, "pixel").mean(-1)[0, 0][~fine[0]].abs().max() < 1e-6


def test_an_images_noise_depends_on_its_seed_alone():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = white_noise(generators(3, 4), (2, 4, 4))
    assert torch.equal(both[1], white_noise(generators(4), (2, 4, 4))[0])
    assert not torch.equal(both[0], both[1])


def test_bad_input():
    with pytest.raises(ValueError, match="copy='bilinear'"):
        siblings(standard(1, 1, 8, 8), "bilinear")
    with pytest.raises(ValueError, match="8 x 6"):
        siblings(standard(1, 1, 8, 6), "pixel")
