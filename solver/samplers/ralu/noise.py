"""Copies of latents on a grid of twice the height and width, and the noise that makes them look like a plain run.

    x_BCHW = enlarge(y_BChw, copy="pixel")
    z_BCHW = correlated_noise(generators, shape, fine_Bhw, c=1 / Z**2)
    x_BCHW = a * x_BCHW + b * z_BCHW

Everything lives on the full grid, where a *cell* is a token of the small picture: 4 x 4 latents, 2 x 2 tokens. There
are two ways to copy: "pixel" repeats each latent 2 x 2 times (nearest neighbour), "token" repeats the cell's patch of
2 x 2 as a whole, as the public code does; that tiles, and brings a pattern of the period of a token. The copies of one
latent are siblings; they share their noise, and the new noise makes up for it.

Shape suffixes: B images, C channels, H W the full grid, h w its cells (H = 4h); D distinct latents of a cell (4), S
siblings (4).

Source: section on noise injection of arXiv 2507.08422; sampling in O(n) and the scale of untouched tokens are ours.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CELL = 4  # latents that a cell is high and wide
SIBLINGS = 4
COPIES = ("pixel", "token")


def siblings(x_BCHW: Tensor, copy: str) -> Tensor:
    """The grid as cells (B, C, h, w, D, S): which latents are copies of the same one.

    Raises:
        ValueError: `copy` is unknown, or the grid does not divide into cells.
    """
    if copy not in COPIES:
        raise ValueError(f"copy={copy!r}: expected one of {', '.join(COPIES)}.")
    height, width = x_BCHW.shape[-2:]
    if height % CELL or width % CELL:
        raise ValueError(f"Latents of {height} x {width}: expected multiples of {CELL}.")
    cells = x_BCHW.unflatten(-1, (-1, 2, 2)).unflatten(-4, (-1, 2, 2))  # B C h (outer, inner) w (outer, inner)
    # pixel: a latent's copies are neighbours, so inner tells copies; token: a patch's are, so outer does.
    order = (5, 3, 6, 4, 7) if copy == "pixel" else (5, 4, 7, 3, 6)
    cells = cells.permute(0, 1, 2, *order)
    return cells.flatten(-2).flatten(-3, -2)


def from_siblings(x_BChwDS: Tensor, copy: str) -> Tensor:
    """The inverse of `siblings`: (B, C, H, W)."""
    cells = x_BChwDS.unflatten(-1, (2, 2)).unflatten(-3, (2, 2))  # B C h w, two of the latents, two of the copies
    cells = cells.permute(0, 1, 2, 4, 6, 3, 5, 7) if copy == "pixel" else cells.permute(0, 1, 2, 6, 4, 3, 7, 5)
    return cells.flatten(-3).flatten(-4, -2)


def enlarge(y_BCHW: Tensor, copy: str) -> Tensor:
    """Latents on twice the grid, each four times. (B, C, H, W) -> (B, C, 2H, 2W); H and W even."""
    distinct = y_BCHW.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 1, 2, 4, 3, 5).flatten(-2)
    return from_siblings(distinct.unsqueeze(-1).expand(*distinct.shape, SIBLINGS), copy)


def reduce(x_BCHW: Tensor, copy: str) -> Tensor:
    """The first sibling of each latent: undoes `enlarge`. (B, C, H, W) -> (B, C, H/2, W/2)."""
    distinct = siblings(x_BCHW, copy)[..., 0].unflatten(-1, (2, 2))
    return distinct.permute(0, 1, 2, 4, 3, 5).flatten(-2).flatten(-3, -2)


def on_grid(cells_Bhw: Tensor) -> Tensor:
    """A mask of cells as one of latents: (B, h, w) -> (B, 1, 4h, 4w)."""
    return cells_Bhw.repeat_interleave(CELL, -2).repeat_interleave(CELL, -1).unsqueeze(1)


def white_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 on the CPU, one generator an image: (B, *shape)."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def block_noise(noise_BCHW: Tensor, c: float, copy: str) -> Tensor:
    """White noise with c of its covariance taken away along each block of siblings: covariance I - c J.

    z = eps - (1 - √(1-4c)) mean(eps), over the siblings.

    Args:
        noise_BCHW: standard normal.
        c: in [0, 1/4]; at 1/4 the blocks have mean zero.
        copy: which latents are siblings.

    Raises:
        ValueError: c is out of range.
    """
    if not 0 <= c <= 1 / SIBLINGS:
        raise ValueError(f"c={c}: expected at least 0 and at most 1/4; beyond, I - c J is no covariance.")
    eps = siblings(noise_BCHW, copy)
    return from_siblings(eps - (1 - math.sqrt(1 - SIBLINGS * c)) * eps.mean(-1, keepdim=True), copy)


def injected_noise(
    noise_BCHW: Tensor, copied_Bhw: Tensor, still_coarse_Bhw: Tensor, c: float, copy: str, scaled: bool = True
) -> Tensor:
    """The noise z of a · copies + b · z between two stages.

    Cells that are copied now get `block_noise`. The others are as independent as before, so that theirs has variance
    1 - c (1 in the public code, which leaves them too noisy by c). In cells that stay coarse all siblings are one
    latent and get one noise.

    Args:
        noise_BCHW: standard normal.
        copied_Bhw: cells that get the full resolution now.
        still_coarse_Bhw: cells that stay one token.
        c: of the schedule.
        copy: which latents are siblings.
        scaled: whether untouched cells' noise has variance 1 - c.
    """
    untouched = math.sqrt(1 - c) if scaled else 1.0
    coarse = enlarge(reduce(noise_BCHW, copy), copy)
    other = untouched * torch.where(on_grid(still_coarse_Bhw), coarse, noise_BCHW)
    return torch.where(on_grid(copied_Bhw), block_noise(noise_BCHW, c, copy), other)
