"""Commutator-zero guidance: x ← x + α (u(x, σ) - target), before the solver's step.

The velocity u is the network's, noise - image as in diffusers; the target is what the network saw at full size, made
small. The paper's t runs from noise to image and its v is -u, hence its other sign: x ← x + α (v* - v). With the wrong
sign strong modes of the picture drift away instead of towards the target.

A correction with α = σ - σ' followed by a step to σ' with the same u is the step with the target's velocity.

Source: Eqs. 11, 12 of arXiv 2604.09227.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from solver.samplers.preview.selection import commutator, norms


class Guidance:
    """A step function for `solver.samplers.cascade.Segment`.

    Args:
        strengths: α of each of the solver's steps to come; steps beyond have none.
        target: the velocity to come close to, as a function of σ: (B, C, [T,] H, W).

    Attributes:
        norms: of u - target before each correction, (B,) each.
    """

    def __init__(self, strengths: Sequence[float], target: Callable[[float], Tensor]):
        self.strengths, self.target = list(strengths), target
        self.norms: list[Tensor] = []

    def __call__(
        self, sample: Tensor, sigma: float, sigma_next: float, model_output: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        alpha = self.strengths.pop(0) if self.strengths else 0.0
        if not alpha:
            return None
        difference = commutator(model_output, self.target(sigma))
        self.norms.append(norms(difference))
        return sample.float() + alpha * difference, model_output


def reevaluated(sigmas: Tensor, strengths: Sequence[float], corrections: int) -> tuple[list[float], list[float]]:
    """Grid and strengths for asking the network again after each correction.

    A correction is then a step of no length: each guided σ is repeated, and only the repetitions are corrected.

    Args:
        sigmas: (K+1,).
        strengths: (K,).
        corrections: how often a guided σ is repeated.
    """
    grid, alphas = [], []
    for sigma, alpha in zip(sigmas.tolist(), strengths, strict=False):
        repeats = corrections if alpha else 0
        grid += [sigma] * (repeats + 1)
        alphas += [*[alpha] * repeats, 0.0]
    return [*grid, float(sigmas[-1])], alphas
