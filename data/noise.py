"""The noise that a picture starts from: a pure function of its seed.

    noise_BCHW = initial_noise([7, 8], shape=(4, 64, 64))

The dataset stores seeds, not noise. Rollouts, evaluation and sampling get the same tensors back, whatever the batch or
the number of processes, because each row has a CPU generator of its own.
"""

import torch

from solver.samplers.latents import initial_noise

__all__ = ["NOISE_CHECK_VALUES", "initial_noise", "noise_check"]

NOISE_CHECK_VALUES = 8  # how many values of the noise a dataset keeps, to notice a generator that drifts


def noise_check(noise_CHW: torch.Tensor) -> list[float]:
    """The first values of a row's noise, as the dataset keeps them."""
    return noise_CHW.flatten()[:NOISE_CHECK_VALUES].tolist()
