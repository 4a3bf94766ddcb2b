"""The noise that a picture starts from: a pure function of its seed.

    noise_BCHW = initial_noise([7, 8], shape=(4, 64, 64))

The dataset stores seeds, not noise. Rollouts, evaluation and sampling get the same tensors back, whatever the batch or
the number of processes, because each row has a CPU generator of its own.
"""

from collections.abc import Sequence

import torch

NOISE_CHECK_VALUES = 8  # how many values of the noise a dataset keeps, to notice a generator that drifts


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, one seed a row.

    Args:
        seeds: B integers.
        shape: of one row, unpacked, e.g. (C, H, W): `solver.samplers.latents.latent_shape(pipeline)`.

    Returns:
        float32 (B, C, H, W) on the CPU. Row b depends on `seeds[b]` and `shape` only.

    Raises:
        ValueError: there are no seeds.
    """
    if not len(seeds):
        raise ValueError("initial_noise needs at least one seed, got none.")
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def noise_check(noise_CHW: torch.Tensor) -> list[float]:
    """The first values of a row's noise, as the dataset keeps them."""
    return noise_CHW.flatten()[:NOISE_CHECK_VALUES].tolist()
