"""From a full-size latent to a small one: which element of each block is kept, and what the network thinks of it.

The operators D of the paper keep one element of every s x s block. `index` says which: 0 .. s²-1, row by row in the
block. They commute with adding and scaling, and white noise stays white.

Shape suffixes: B pictures, K = s² candidates, H W blocks (H = height / s). Latents are (B, C, [T,] height, width); all
frames of a video are treated alike.

Source: Eqs. 7-9 of arXiv 2604.09227.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from solver.samplers.latents import generator_beside


def phases(batch_size: int, height: int, width: int, scale: int) -> Tensor:
    """The s² operators that keep the same element in every block: int64 (K, B, H, W)."""
    index_K = torch.arange(scale**2)
    return index_K[:, None, None, None].expand(-1, batch_size, height // scale, width // scale)


def random_selections(seeds: Sequence[int], height: int, width: int, scale: int) -> Tensor:
    """s² operators that keep, in every block, the elements of a random order: int64 (K, B, H, W).

    Candidate k keeps the k-th, so together they keep every element once, and none shifts the picture as a whole.

    Args:
        seeds: one a picture; its operators depend on nothing else.
        height, width: of the latent.
        scale: s.
    """
    blocks = (height // scale, width // scale)
    generators = [generator_beside(seed) for seed in seeds]
    order_BHWK = torch.stack([torch.rand(*blocks, scale**2, generator=g) for g in generators]).argsort(dim=-1)
    return order_BHWK.movedim(-1, 0)


def subsample(x: Tensor, index_BHW: Tensor, scale: int, unit: int = 1) -> Tensor:
    """D x: of every block, the element that the index names.

    Args:
        x: (B, C, [T,] height, width).
        index_BHW: int64, 0 .. s²-1.
        scale: s.
        unit: side of an element in latents: 1, or that of a token, where whole tokens are kept.

    Returns:
        (B, C, [T,] height / s, width / s).
    """
    *lead, height, width = x.shape
    blocks = (height // (scale * unit), width // (scale * unit))
    x = x.reshape(*lead, blocks[0], scale, unit, blocks[1], scale, unit)
    x = x.movedim((-5, -2), (-2, -1)).flatten(-2)  # (..., H, unit, W, unit, s²)
    index = index_BHW.to(x.device).reshape(len(x), *[1] * (len(lead) - 1), blocks[0], 1, blocks[1], 1, 1)
    kept = x.gather(-1, index.expand(*x.shape[:-1], 1))[..., 0]
    return kept.reshape(*lead, height // scale, width // scale)


def block_mean(x: Tensor, scale: int) -> Tensor:
    """Mean of every s x s block; white noise stays white, with 1/s of its standard deviation."""
    mean = F.avg_pool2d(x.flatten(1, -3), scale)
    return mean.reshape(*x.shape[:-2], *mean.shape[-2:])


def commutator(small_velocity: Tensor, kept_velocity: Tensor) -> Tensor:
    """u(D x) - D u(x) in diffusers' sign, where the velocity u is noise - image; float32."""
    return small_velocity.float() - kept_velocity.float()


def norms(x: Tensor) -> Tensor:
    """L2 norm over the whole tensor of each picture: (B,)."""
    return x.flatten(1).norm(dim=1)


def choose(rule: str, commutators_K: Tensor, seeds: Sequence[int]) -> Tensor:
    """Which candidate each picture takes: int64 (B,).

    Args:
        rule: `"argmin"` (Eq. 8), or the controls `"argmax"` and `"random"`.
        commutators_K: (K, B, ...).
        seeds: one a picture, for `"random"`.
    """
    norms_KB = torch.stack([norms(c) for c in commutators_K])
    if rule == "random":
        generators = [generator_beside(seed, 1) for seed in seeds]
        return torch.cat([torch.randint(len(norms_KB), (1,), generator=g) for g in generators])
    return (norms_KB.argmin(dim=0) if rule == "argmin" else norms_KB.argmax(dim=0)).cpu()


def choose_blockwise(commutators_K: Tensor, index_KBHW: Tensor, unit: int = 1) -> Tensor:
    """The operator that takes in each block the candidate with the smallest commutator there: int64 (B, H, W).

    A candidate's commutator at a block is its norm over channels, and frames.
    """
    squared = commutators_K.square().flatten(2, -3).sum(dim=2)  # (K, B, height / s, width / s)
    best_1BHW = F.avg_pool2d(squared, unit).argmin(dim=0, keepdim=True)
    return index_KBHW.to(best_1BHW.device).gather(0, best_1BHW)[0]


def of_chosen(candidates_K: Tensor, chosen_B: Tensor) -> Tensor:
    """(K, B, ...) → (B, ...): the candidate that each picture took."""
    return candidates_K[chosen_B.to(candidates_K.device), torch.arange(len(chosen_B), device=candidates_K.device)]


def mean_sigma(sigmas: Tensor, scale: int) -> Tensor:
    """The noise level of a block mean: σ' = σ / (σ + s (1 - σ)); 2 x 2: σ / (2 - σ).

    The mean of s x s independent noise values has 1/s of their deviation, so the mean of x_σ = (1-σ) x_0 + σ ε is a
    small picture at a lower noise level, up to a factor. This is also the resolution shift of SD3.
    """
    return sigmas / (sigmas + scale * (1 - sigmas))


def split(x: Tensor, velocity: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The image and the noise that the network sees in x: x̂_0 = x - σ u, x̂_1 = x + (1 - σ) u; float32."""
    x, velocity = x.float(), velocity.float()
    return x - sigma * velocity, x + (1 - sigma) * velocity
