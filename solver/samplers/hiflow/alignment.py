"""HiFlow's three alignments of a large image's flow with that of the smaller one, in terms of predictions of x_0.

At a step of noise level s the network predicts X of the large image; R is the enlarged prediction that the smaller
image had at the same noise level. Direction alignment pulls the low band of X towards that of R,

    D_k = X_k + α_k LP(R_k - X_k)                                                                  (Eq. 8)

and acceleration alignment the change of the velocity between two steps towards that of the reference,

    v̂_k = v_k + β_k (v̂_{k-1} + w_k - w_{k-1} - v_k),   v = (x - D) / s,   w = (x - R) / s     (after Eq. 13)

The step is taken with O_k = x_k - s_k v̂_k. Since x_k = O_{k-1} + s_k v̂_{k-1} for Euler, (13) is a leaky mean of the
residual against the reference, and no velocity is left in it (`accelerate`). s is σ for flow models and σ/α for ε- and
v-models, in both of which dx = v ds after division of the state by α; the rules are the same.

Source: arXiv 2504.06232 and its public code. The paper leaves the sample of the reference open; the code, followed
here, takes the large image's own x_k. And where the code goes on from the corrected velocity v̂_{k-1}, so that every
residual fades step by step, the paper prints v_{k-1}, and remembers the last residual alone: the rule "eq13".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from solver.samplers.hiflow.lowpass import lowpass

SHARPENING_SIGMA = 1.05  # pixels; the public code draws it anew from [0.1, 2.0] at each call, this is the mean
ACCELERATION_RULES = ("code", "eq13", "eq10", "fixed-noise")


def enlarge(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, with pixel areas aligned: the centre of the image stays its centre."""
    return F.interpolate(x_BCHW, (height, width), mode="bicubic", align_corners=False)


def sharpen(images_BCHW: Tensor, sigma: float = SHARPENING_SIGMA) -> Tensor:
    """Unsharp mask 2 I - G(I), G a 3 x 3 Gaussian of `sigma` pixels. Flat areas stay as they are."""
    weights = torch.exp(-0.5 * (torch.arange(-1, 2, device=images_BCHW.device, dtype=images_BCHW.dtype) / sigma) ** 2)
    weights = weights / weights.sum()
    channels = images_BCHW.shape[1]
    kernel = (weights[:, None] * weights).expand(channels, 1, 3, 3)
    return 2 * images_BCHW - F.conv2d(F.pad(images_BCHW, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)


def align_direction(prediction: Tensor, reference: Tensor, alpha: float, cutoff: float) -> Tensor:
    """D = X + α LP(R - X), Eq. 8.

    Args:
        prediction: X, (B, C, H, W).
        reference: R, of the same shape.
        alpha: 0 leaves X as it is, 1 takes the whole low band of R.
        cutoff: of the low-pass filter, in Nyquist frequencies.
    """
    return prediction + alpha * lowpass(reference - prediction, cutoff) if alpha else prediction


def accelerate(
    aligned: Tensor,
    reference: Tensor,
    previous: tuple[Tensor, Tensor, float] | None,
    beta: float,
    s: float,
    rule: str = "code",
) -> Tensor:
    """O of this step, in terms of x_0.

        code:         O_k - R_k = (1 - β)(D_k - R_k) + β (s_k / s_{k-1}) (O_{k-1} - R_{k-1})
        eq13:         the same with D_{k-1} for O_{k-1}: Eq. 13 as printed, from the velocity before its correction
        eq10:         as code without the ratio: Eq. 10 taken literally, the reference on a trajectory of its own
        fixed-noise:  O_k = D_k + β (s_k (R_k - R_{k-1}) - (D_k - O_{k-1})), the reference velocity being ε - R with
                      one ε for all steps, as in a public port to video; flow models only

    Args:
        aligned: D_k.
        reference: R_k.
        previous: (O, R, s) of the step before, for eq13 (D, R, s); None at the first step of a stage, where O = D.
        beta: 0 switches the rule off.
        s: noise level of this step, > 0.
        rule: one of `ACCELERATION_RULES`.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in ACCELERATION_RULES:
        raise ValueError(f"acceleration rule {rule!r}: expected one of {', '.join(ACCELERATION_RULES)}.")
    if previous is None or not beta:
        return aligned
    last, last_reference, last_s = previous
    if rule == "fixed-noise":
        return aligned + beta * (s * (reference - last_reference) - (aligned - last))
    memory = beta * (1 if rule == "eq10" else s / last_s)
    return reference + (1 - beta) * (aligned - reference) + memory * (last - last_reference)


class Trajectory:
    """Predictions of x_0 of one stage by noise level: what the next stage looks up.

    Between two levels that were seen it interpolates linearly, outside it holds the nearest: stages that share a grid
    read exactly what was written, and a single entry serves all levels (a given image).
    """

    def __init__(self, entries: dict[float, Tensor] | None = None):
        self.entries = dict(entries or {})

    def record(self, s: float, prediction_BCHW: Tensor) -> None:
        self.entries[float(s)] = prediction_BCHW

    def at(self, s: float) -> Tensor:
        """x_0 as predicted at noise level `s`.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.entries:
            raise ValueError("No prediction was recorded, so there is no reference: run the smaller stage first.")
        if s in self.entries:
            return self.entries[s]
        below = max((level for level in self.entries if level < s), default=None)
        above = min((level for level in self.entries if level > s), default=None)
        if below is None or above is None:
            return self.entries[above if below is None else below]
        return torch.lerp(self.entries[below], self.entries[above], (s - below) / (above - below))

    def row(self, i: int) -> "Trajectory":
        """That of picture number i alone."""
        return Trajectory({s: x_BCHW[i : i + 1] for s, x_BCHW in self.entries.items()})

    @classmethod
    def of_rows(cls, rows: Sequence["Trajectory"]) -> "Trajectory":
        """The inverse of `row`."""
        return cls({s: torch.cat([row.entries[s] for row in rows]) for s in rows[0].entries})


class StageAlignment:
    """Direction and acceleration alignment along the steps of one stage.

    Args:
        reference: predictions of the stage before; None at the base, which only records.
        alphas, betas: strengths, one a step.
        cutoff: of the low-pass filter, in Nyquist frequencies of this stage's latents.
        rule: of the acceleration, one of `ACCELERATION_RULES`.

    Attributes:
        predictions: the network's own X of each step, float32, before any alignment: the next stage's reference.
        step: how many steps were taken.
    """

    def __init__(
        self,
        reference: Trajectory | None = None,
        alphas: tuple[float, ...] = (),
        betas: tuple[float, ...] = (),
        cutoff: float = 0.2,
        rule: str = "code",
    ):
        self.reference, self.alphas, self.betas, self.cutoff, self.rule = reference, alphas, betas, cutoff, rule
        self.predictions = Trajectory()
        self.active = reference is not None and any((*alphas, *betas))
        self.step = 0
        self._previous: tuple[Tensor, Tensor, float] | None = None

    def __call__(self, prediction_BCHW: Tensor, s: float) -> Tensor:
        """O_k for the network's X_k, (B, C, H, W), at noise level s_k; called once a step, in order."""
        prediction = prediction_BCHW.float()
        self.predictions.record(s, prediction)
        k, self.step = self.step, self.step + 1
        if not self.active:
            return prediction
        reference = enlarge(self.reference.at(s).to(prediction.device), *prediction.shape[-2:])
        aligned = align_direction(prediction, reference, self.alphas[k], self.cutoff)
        corrected = accelerate(aligned, reference, self._previous, self.betas[k], s, self.rule)
        self._previous = (aligned if self.rule == "eq13" else corrected, reference, s)
        return corrected
