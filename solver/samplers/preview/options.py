"""What can be chosen about a preview, what it costs, and the grid of its small part."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solver.samplers.preview.selection import mean_sigma

METHODS = ("subsample", "mean")
CANDIDATES = ("random", "phases")
SELECTIONS = ("argmin", "blockwise", "argmax", "random", "nearest")
GRIDS = ("same", "native", "remapped")
TARGETS = ("frozen", "extrapolated")
UNITS = ("pixels", "tokens")
POSITIONS = ("native", "strided")
# Where nothing is said: of the paper, and what was best for the mean on 100 validation captions of the miniature.
GUIDANCE = {
    "subsample": {"guided_steps": 1 / 6, "kappa": 2.0},
    "mean": {"guided_steps": 1 / 3, "kappa": 1.0},
}
FEWEST_STEPS = 5  # a distilled model of fewer has no velocity that stays nearly constant


@dataclass(frozen=True)
class PreviewOptions:
    """The knobs of a preview. Steps D and m are numbers of steps, or fractions of the run; of few small steps, m is a
    fraction in proportion.

    The paper's setting is `method="subsample"`, with its defaults where it says them: D = 10 and m = 5 of 30 steps,
    and in proportion of other numbers, factor 2, argmin, one correction a step, and κ = 2, which is its α = 0.04 on
    FLUX's grid; on SD3.5 its α = 0.01 is κ = 0.5. The mean is nearer to the full-size picture and costs less, as
    measured on a miniature (`benchmarks.quality.preview`), with a velocity that is kept for twice as many steps and
    not overdone.

    Attributes:
        num_inference_steps: N of the full-size run.
        switch: D, the full-size steps before the small ones.
        guided_steps: m; a third of the run for the mean, a sixth else.
        method: `"mean"` of each block, at the noise level that it has, σ' = σ / (σ + s (1 - σ)), which is ours; or the
            paper's `"subsample"`, one element of each block at the same noise level.
        scale: s, how much smaller a side is.
        candidates: of `"subsample"`: `"random"`, in every block another order; `"phases"`, the same in every block.
        selection: `"argmin"` of the commutator's norm; `"blockwise"` in each block on its own; the controls
            `"argmax"`, `"random"` and `"nearest"` (always the block's first element).
        unit: what is kept of a block: latent `"pixels"`, or whole `"tokens"`.
        kappa: strength in units of the step, α = κ (σ - σ'); 1 means: take the full-size velocity for this step. By
            default 1 for the mean, 2 else.
        alpha: strength as the paper gives it, the same at every step; then kappa is ignored.
        fading: weaken the strength evenly over the guided steps, from all of it to one m-th.
        reevaluate: whether the network is asked again after a correction; else the velocity it gave before is used.
        corrections: in a guided step; more than one needs `reevaluate`.
        guide_at_switch: guide steps D .. D+m-1 instead of D+1 .. D+m.
        target: the full-size velocity of step D, `"frozen"`, or `"extrapolated"` from steps D-1 and D.
        grid: sigmas of the small steps: the `"same"` as at full size, or the `"native"` ones of the small size; or, of
            `"subsample"`, those of the mean, `"remapped"`, from where the noise is that of the switch.
        small_steps: how many small steps there are; as many as the full-size run has left where it is None.
        positions: ids of the small tokens: `"native"`, or those that they had at full size, `"strided"` (FLUX only).
        gain: of `"mean"`: (factors, offsets), one a channel: what a mean of full-size latents has to be multiplied
            with, and what added, to be latents of the small picture.

    Raises:
        ValueError: for any other value.
    """

    num_inference_steps: int = 30
    switch: int | float = 1 / 3
    guided_steps: int | float | None = None
    method: str = "mean"
    scale: int = 2
    candidates: str = "random"
    selection: str = "argmin"
    unit: str = "pixels"
    kappa: float | None = None
    alpha: float | None = None
    fading: bool = False
    reevaluate: bool = False
    corrections: int = 1
    guide_at_switch: bool = False
    target: str = "frozen"
    grid: str = "same"
    small_steps: int | None = None
    positions: str = "native"
    gain: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self):
        allowed = {
            "method": METHODS, "candidates": CANDIDATES, "selection": SELECTIONS, "unit": UNITS, "target": TARGETS,
            "grid": GRIDS, "positions": POSITIONS,
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, values))}.")
        usual_steps = self.guided_steps is None
        for name, value in GUIDANCE[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("num_inference_steps", "scale", "corrections", "small_steps"):
            value = getattr(self, name)
            if not _is(Integral, value) and not (name == "small_steps" and value is None):
                raise ValueError(f"{name}={value!r}: expected a whole number.")
        for name in ("switch", "guided_steps", "kappa", "alpha"):
            value = getattr(self, name)
            if not _is(Real, value) and not (name == "alpha" and value is None):
                raise ValueError(f"{name}={value!r}: expected a number.")
        self._check_distilled()
        self._count_steps("switch", self.num_inference_steps)
        # Of few small steps as many in proportion: more would guide to where the full-size run is not going any more.
        left = self.num_inference_steps - self.switch
        whole = self.num_inference_steps if left <= 0 else self.num_inference_steps * (self.small_steps or left) / left
        self._count_steps("guided_steps", whole)
        if usual_steps:
            object.__setattr__(self, "guided_steps", max(0, min(self.guided_steps, self.most_guided_steps)))
        self._check_steps()
        if self.corrections < 1 or (self.corrections > 1 and not self.reevaluate):
            raise ValueError(f"corrections={self.corrections}: expected 1, or more with reevaluate=True.")
        if self.scale < 2:
            raise ValueError(f"scale={self.scale}: expected 2 or more.")
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"alpha={self.alpha}, kappa={self.kappa}: expected a finite strength of at least 0.")
        self._check_method()
        if self.target == "extrapolated" and self.switch < 1:
            raise ValueError("target='extrapolated' needs the velocities of two steps, so a switch of 1 or more.")

    def _check_method(self) -> None:
        """What belongs to the other method would be without effect."""
        if self.method == "subsample" and self.gain is not None:
            raise ValueError("gain: only method='mean' has one.")
        usual = {field.name: field.default for field in fields(self)}
        given = [name for name in ("candidates", "selection", "unit") if getattr(self, name) != usual[name]]
        given += ["grid"] if self.grid == "remapped" else []
        if self.method == "mean" and given:
            shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"{shown}: only method='subsample' has a choice there; give that as well.")

    def _count_steps(self, name: str, whole: float) -> None:
        """Makes a fraction of the whole a number of steps."""
        value = getattr(self, name)
        steps = round(value * whole) if isinstance(value, float) and 0 < value < 1 else value
        if not math.isfinite(steps) or steps != int(steps):
            raise ValueError(f"{name}={value}: expected a whole number of steps, or a fraction below 1.")
        object.__setattr__(self, name, int(steps))

    def _check_distilled(self) -> None:
        """Before fractions are rounded: a third of 1 step asks for guidance, though it becomes none."""
        if self.is_guided and 0 < self.num_inference_steps < FEWEST_STEPS:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps}: guidance needs a velocity that stays nearly "
                f"constant for some steps, and a distilled model of fewer than {FEWEST_STEPS} has none. Use "
                "guided_steps=0."
            )

    def _check_steps(self) -> None:
        total, small = self.num_inference_steps, self.small_steps
        if total < 1:
            raise ValueError(f"num_inference_steps={total}: expected at least 1.")
        if not 0 <= self.switch < total:
            raise ValueError(f"switch={self.switch}: expected 0 to {total - 1}, a step of the {total}-step run.")
        if small is not None and small < 1:
            raise ValueError(f"small_steps={small}: expected at least 1.")
        most = self.most_guided_steps
        if not 0 <= self.guided_steps <= most:
            raise ValueError(
                f"guided_steps={self.guided_steps}: expected 0 to {most}, the small steps "
                f"{'from' if self.guide_at_switch else 'after'} step {self.switch} on."
            )

    @property
    def number_of_small_steps(self) -> int:
        """Steps from the switch to the end at the small size."""
        return self.small_steps or self.num_inference_steps - self.switch

    @property
    def most_guided_steps(self) -> int:
        """As many small steps as there are from the switch, or after it."""
        return self.number_of_small_steps - (0 if self.guide_at_switch else 1)

    @property
    def strength(self) -> float:
        """α or κ, whichever counts."""
        return self.kappa if self.alpha is None else self.alpha

    @property
    def is_guided(self) -> bool:
        """Whether any step is corrected."""
        return self.guided_steps > 0 and self.strength > 0

    @property
    def asks_candidates(self) -> bool:
        """Whether the network judges the candidates."""
        return self.method == "subsample" and self.selection in ("argmin", "argmax", "blockwise")

    @property
    def needs_velocity(self) -> bool:
        """Whether the network is evaluated at full size at the switch."""
        return self.asks_candidates or self.is_guided or self.gain is not None

    @property
    def reuses_winner(self) -> bool:
        """Whether the small step at the switch is done already, by the candidate that was taken."""
        return (
            self.asks_candidates
            and self.selection != "blockwise"
            and not (self.reevaluate and self.guide_at_switch and self.is_guided)
        )

    @property
    def full_steps(self) -> int:
        """Evaluations at full size, and so the step at which a checkpoint goes on: D, or D + 1."""
        return self.switch + self.needs_velocity

    @property
    def small_evaluations(self) -> int:
        """Evaluations at the small size, those of the candidates included."""
        extra = self.guided_steps * self.corrections if self.reevaluate and self.is_guided else 0
        candidates = self.scale**2 if self.asks_candidates else 0
        return candidates + self.number_of_small_steps - self.reuses_winner + extra

    def step_strengths(self, sigmas: Tensor) -> list[float]:
        """α of every small step, from the switch on; 0 where there is no correction."""
        first = 0 if self.guide_at_switch else 1
        falls = (-sigmas.diff()).tolist()
        alphas = [self.kappa * fall if self.alpha is None else self.alpha for fall in falls]
        guided = range(first, first + self.guided_steps)
        weights = [1 - (i - first) / self.guided_steps if self.fading else 1.0 for i in guided]
        weight = dict(zip(guided, weights, strict=True))
        return [alpha * weight.get(i, 0.0) for i, alpha in enumerate(alphas)]

    def small_sigmas(self, full: Tensor, native: Tensor) -> Tensor:
        """The grid of the small steps, float32 (K+1,), from the switch to the end.

        Fewer or more steps than are left, and native grids, are read off the given ones at equal distances of the
        (fractional) step number, from where the noise is that of the switch.

        Args:
            full: (N+1,), the grid of the full-size run.
            native: (N+1,), that of a run at the small size.
        """
        start, steps = float(full[self.switch]), self.number_of_small_steps
        if self.method == "mean":
            full = mean_sigma(full, self.scale)
            start = float(full[self.switch])
        if self.grid == "same" and self.small_steps is None:
            return full[self.switch :]
        if self.grid == "remapped":
            full = mean_sigma(full, self.scale)
        grid = (native if self.grid == "native" else full).double().numpy()
        number = np.arange(len(grid), dtype=float)
        begin = np.interp(-start, -grid, number)
        sigmas = np.interp(np.linspace(begin, number[-1], steps + 1), number, grid)
        sigmas[0] = start
        return torch.from_numpy(sigmas).float()


def _is(kind: type, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Phase(NamedTuple):
    """A part of a preview's run, or of its refinement.

    Attributes:
        name: what happens.
        size: (height, width) in pixels.
        steps: of the solver; 0 where only the network is asked.
        network_calls: evaluations for one picture, guidance's two branches counted once.
        sigmas: of the steps, both ends included.
    """

    name: str
    size: tuple[int, int]
    steps: int
    network_calls: int
    sigmas: list[float]


def plan(options: PreviewOptions, height: int, width: int, full: Tensor, native: Tensor) -> list[Phase]:
    """The phases of a preview and of its refinement, the last one. Grids as in `small_sigmas`."""
    large, small = (height, width), (height // options.scale, width // options.scale)
    sigmas, switch, done = options.small_sigmas(full, native).tolist(), options.switch, options.full_steps
    phases = []
    if done:
        phases.append(Phase("full size", large, done, done, full[: done + 1].tolist()))
    if options.asks_candidates:
        phases.append(Phase("candidates", small, 0, options.scale**2, [float(full[switch])]))
    guided = options.guided_steps + (not options.guide_at_switch) if options.is_guided else 0
    reused = int(options.reuses_winner)
    extra = options.small_evaluations - options.number_of_small_steps + reused
    extra -= options.scale**2 if options.asks_candidates else 0
    if guided:
        phases.append(Phase("small, guided", small, guided, guided - reused + extra, sigmas[: guided + 1]))
    if guided < len(sigmas) - 1:
        left = len(sigmas) - 1 - guided
        phases.append(Phase("small", small, left, left - (0 if guided else reused), sigmas[guided:]))
    remaining = options.num_inference_steps - done
    return [*phases, Phase("refine", large, remaining, remaining, full[done:].tolist())]
