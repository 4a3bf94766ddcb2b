"""How sure a number is: bootstrap intervals over prompts, of estimates and of paired differences.

The resamples of n prompts are a function of the seed and n, so two solvers measured on the same prompts are resampled
alike, and the difference of their replicates is that of a paired bootstrap (Efron and Tibshirani, 1993, §16).

Shape suffixes: N prompts, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

SET_RESAMPLES = 50  # for statistics of whole sets, which cost milliseconds each


@dataclass(frozen=True)
class Estimate:
    """A number and what it would have been on other prompts.

    Attributes:
        value: the number.
        replicates: float64 (R,), one a resample.
        centred: whether the interval is value ± 1.96 standard deviations of the replicates rather than their
            percentiles. For statistics that a resample shifts, such as a Fréchet distance.
        count: of prompts.
    """

    value: float
    replicates: torch.Tensor
    centred: bool = False
    count: int = 0

    @property
    def ci95(self) -> list[float]:
        """Lower and upper end of the 95 % interval."""
        if self.centred:
            reach = 1.96 * float(self.replicates.std())
            return [self.value - reach, self.value + reach]
        return torch.quantile(self.replicates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The paired difference. Raises ValueError if the two were not resampled alike."""
        if len(self.replicates) != len(other.replicates):
            raise ValueError(f"{len(self.replicates)} and {len(other.replicates)} resamples do not pair.")
        if self.count != other.count:
            raise ValueError(f"Estimates on {self.count} and {other.count} prompts do not pair.")
        replicates = self.replicates - other.replicates
        return Estimate(self.value - other.value, replicates, self.centred or other.centred, self.count)


@lru_cache(maxsize=8)  # a table asks hundreds of times for the same few
def resample_weights(count: int, resamples: int, seed: int = 0) -> torch.Tensor:
    """How often each of `count` prompts is drawn, over `count`: float64 (R, N), rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn_RN = torch.randint(count, (resamples, count), generator=generator)
    times_RN = torch.zeros(resamples, count, dtype=torch.float64)
    return times_RN.scatter_add_(1, drawn_RN, torch.ones_like(times_RN)) / count


def mean(values_N: torch.Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of one value a prompt."""
    values_N = values_N.double()
    replicates = resample_weights(len(values_N), resamples, seed) @ values_N
    return Estimate(float(values_N.mean()), replicates, count=len(values_N))


def statistic(function: Callable[[torch.Tensor], float], count: int, seed: int = 0) -> Estimate:
    """Any statistic of `count` prompts, as a function of their weights, float64 (N,) that sum to 1."""
    weights_RN = resample_weights(count, SET_RESAMPLES, seed)
    replicates = torch.tensor([function(weights_N) for weights_N in weights_RN], dtype=torch.float64)
    value = function(torch.full((count,), 1 / count, dtype=torch.float64))
    return Estimate(value, replicates, centred=True, count=count)
