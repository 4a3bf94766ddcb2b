"""The three stages of RALU: where each starts and ends, its sigmas, and the search that matches its timesteps.

    schedule = PRESETS["4x"]
    schedule = solve(steps=(5, 6, 7), ends=(0.3, 0.45, 1.0), ratio=0.3, shift=3.16)  # NT-matching
    first, mixed, full = schedule.stage_sigmas()

Stage k takes N_k Euler steps from time s_k to e_k, s_1 = 0, e_3 = 1. Between stages the latents are copied to the
larger grid and noised again, which sets the time back to s_{k+1} (`restart`). The paper's time t is 0 at noise, 1 at
data; sigmas are those of diffusers, sigma = 1 - t. Z = 1/√c says how strongly the noise of copies is correlated.

Source: arXiv 2507.08422, v3; where its tables and its public code differ, the comments say which is followed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral

import numpy as np
from scipy.optimize import minimize
from scipy.spatial.distance import jensenshannon

COPIES = 4  # of a latent, when height and width are doubled
Z_MIN = math.sqrt(COPIES)  # c = 1/Z² at most 1/4: beyond, the noise of a block of copies would have no covariance
Z_MAX = 100.0
SHIFT_BOUNDS = (0.5, 10.0)  # of the public code, whose plain run has shift 3
FAR = 0.03  # distance from which on artefacts are said to show
WORTH = 1e-3  # how much nearer another search has to come
NARROWEST = 1e-3  # stage, in the paper's time: the grid on which densities are compared
GRID = np.linspace(0.0, 1.0, 1000)  # the times at which densities are compared
DENSITY_FLOOR = 1e-10
LARGEST_SHIFT = 1e6  # beyond, all times of a plain run fall on one point of `GRID`
PUBLISHED_SHIFT = 3.0  # of FLUX.1-dev and SD3's schedulers, static; for it the published presets were solved


@dataclass(frozen=True)
class Schedule:
    """Three stages.

    Attributes:
        steps: N_1, N_2, N_3, of each stage (the paper's tables count them up).
        ends: e_1 < e_2 < e_3 = 1, in the paper's time.
        ratio: share of the small picture's tokens that get the full resolution in the second stage, in (0, 1).
        shifts: h_1, h_2, h_3, of each stage's grid.
        Z: 1/√c, at least 2.
        shift: of the plain run whose timesteps are matched.
    """

    steps: tuple[int, int, int]
    ends: tuple[float, float, float]
    ratio: float
    shifts: tuple[float, float, float]
    Z: float
    shift: float = PUBLISHED_SHIFT

    def __post_init__(self):
        check_stages(self.steps, self.ends, self.ratio)
        check_Z(self.Z)
        if len(self.shifts) != 3 or not all(0 < h < math.inf for h in self.shifts):
            raise ValueError(f"shifts={self.shifts}: expected three positive finite numbers.")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift}: expected a positive number.")

    @property
    def c(self) -> float:
        """How much of the noise of a block of copies is taken away along the block."""
        return 1 / self.Z**2

    @property
    def starts(self) -> tuple[float, float, float]:
        """s_1, s_2, s_3."""
        return stage_starts(self.ends, self.Z)

    @property
    def js_distance(self) -> float:
        """Of this schedule's timesteps to those of the plain run."""
        return js_distance(self.steps, self.ends, self.shifts, self.Z, self.shift)

    def stage_sigmas(self) -> tuple[list[float], list[float], list[float]]:
        """The N_k + 1 sigmas of each stage, both ends included."""
        stages = zip(self.starts, self.ends, self.shifts, self.steps, strict=True)
        return tuple(sigma_grid(1 - s, 1 - e, h, n) for s, e, h, n in stages)


def restart(end: float, Z: float) -> tuple[float, float, float]:
    """The step back between stages: start s of the next one, and a, b of a · copies + b · noise.

    With copies of noise that are equal within a block of 4, and new noise of covariance I - c J within a block, the
    result is a sample of time s if a e = s and b = 1 - s. s < e always; e = 1 gives s = a = 1, b = 0.

    Args:
        end: e of the stage that ends, in (0, 1].
        Z: 1/√c.

    Raises:
        ValueError: Z < 2.
    """
    check_Z(Z)
    delta = Z * (1 - end)
    return end / (delta + end), 1 / (delta + end), delta / (delta + end)


def stage_starts(ends: Sequence[float], Z: float) -> tuple[float, ...]:
    """s_1 = 0, and where each following stage starts."""
    return (0.0, *(restart(end, Z)[0] for end in ends[:-1]))


def sigma_grid(start: float, end: float, shift: float, steps: int) -> list[float]:
    """steps + 1 sigmas, equally spaced before the shift h: sigma = h u / (1 + (h-1) u). Both ends are exact."""
    u = np.linspace(_unshift(start, shift), _unshift(end, shift), int(steps) + 1)
    sigmas = shift * u / (1 + (shift - 1) * u)
    return [start, *sigmas[1:-1].tolist(), end]


def _unshift(sigma: float, shift: float) -> float:
    return sigma / (shift - (shift - 1) * sigma)


# ---------------------------------------------------------------------------------------------------------------------
# NT-matching: timesteps as dense as those of the plain run
# ---------------------------------------------------------------------------------------------------------------------


def density(shift: float, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """Density of the times that a shift h makes of uniform ones, on `GRID`, cut to [start, end]."""
    t = GRID
    mass = _distribution(shift, end) - _distribution(shift, start)
    inside = (t >= start) & (t <= end)
    return np.where(inside, shift / (1 + (shift - 1) * t) ** 2 / mass, 0.0)


def _distribution(shift: float, t: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def js_distance(steps, ends, shifts, Z: float, shift: float) -> float:
    """Jensen-Shannon distance between the times of three stages and the wanted ones.

    Wanted are those of the plain run, where the stages overlap as often as they overlap. This is the square root of
    the divergence, in nats; the paper calls it divergence and prints the distance.
    """
    starts = stage_starts(ends, Z)
    weights = np.asarray(steps) / sum(steps)
    actual = sum(w * density(h, s, e) for w, h, s, e in zip(weights, shifts, starts, ends, strict=True))
    return _distance(actual, _target(ends, starts, shift))


def _target(ends, starts, shift: float) -> np.ndarray:
    twice = ((end, start) for end, start in zip(ends[:-1], starts[1:], strict=True))
    return density(shift) + sum((end - start) * density(shift, start, end) for end, start in twice)


def _distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(jensenshannon(np.maximum(p, DENSITY_FLOOR), np.maximum(q, DENSITY_FLOOR)))  # scipy normalises


def published_search(steps, ends, shift: float = PUBLISHED_SHIFT) -> tuple[tuple[float, float, float], float]:
    """Shifts and Z of the public code: L-BFGS-B from (3, 3, 3; Z = 2), Z free up to 100.

    The distance is flat in Z from about 6 on, so the published Z is where the search happened to stop, and on other
    models it runs away and forgets the small picture. `solve` bounds it.
    """

    def objective(x):
        return js_distance(steps, ends, x[:3], x[3], shift)

    found = minimize(
        objective, (3.0, 3.0, 3.0, Z_MIN), method="L-BFGS-B", bounds=(*[SHIFT_BOUNDS] * 3, (Z_MIN, Z_MAX))
    )
    return tuple(found.x[:3].tolist()), float(found.x[3])


def solve(
    steps: Sequence[int],
    ends: Sequence[float],
    ratio: float,
    shift: float,
    slack: float = 0.05,
    Z_max: float = 20.0,
    enough: float = 0.017,
) -> Schedule:
    """NT-matching with the smallest Z, that is the most of the small picture kept, that matches well.

    The bounds of the shifts grow with the shift of the plain run, which dynamic shifting makes large at large sizes.

    Args:
        steps: N of each of the three stages, in a sequence or an array.
        ends: e of each, the last 1; likewise.
        ratio: share of tokens with the full resolution in the second stage.
        shift: of the plain run, `scheduler_shift` of its scheduler.
        slack: how much worse than the best distance may be, for a smaller Z.
        Z_max: the largest Z tried.
        enough: a distance that is good enough, however much better another Z may be: about the best that there is for
            the published 4x; artefacts are said to be gone at `FAR`.

    Raises:
        ValueError: stages, ratio, shift, slack or Z_max make no sense.
    """
    steps, ends = (values.tolist() if isinstance(values, np.ndarray) else values for values in (steps, ends))
    check_stages(steps, ends, ratio)
    steps, ends = tuple(steps), tuple(float(end) for end in ends)
    if not 1 / LARGEST_SHIFT <= shift <= LARGEST_SHIFT:
        raise ValueError(f"shift={shift}: expected a number from {1 / LARGEST_SHIFT:g} to {LARGEST_SHIFT:g}.")
    if slack < 0 or Z_max < Z_MIN:
        raise ValueError(f"slack={slack}, Z_max={Z_max}: expected at least 0 and {Z_MIN}.")
    shifts, Z = _match(steps, ends, float(shift), slack, Z_max, enough)
    return Schedule(tuple(int(n) for n in steps), ends, ratio, shifts, Z, float(shift))


def shift_bounds(shift: float) -> tuple[float, float]:
    """Between which the shifts of the stages are searched, for a plain run of this shift."""
    low, high = (bound * shift / PUBLISHED_SHIFT for bound in SHIFT_BOUNDS)
    return min(low, SHIFT_BOUNDS[0]), max(high, SHIFT_BOUNDS[1])


@cache
def _match(steps, ends, shift: float, slack: float, Z_max: float, enough: float):
    """Shifts and Z, searched as the public code does; where that stays far away, also in units of the plain shift.

    From 3 on the search does not find its way to the shifts of FLUX at 4096 px, whose plain run has 100 000.
    """
    found = _smallest_matching_Z(steps, ends, shift, slack, Z_max, enough, PUBLISHED_SHIFT, 1.0)
    if found[0] > FAR:
        other = _smallest_matching_Z(steps, ends, shift, slack, Z_max, enough, 1.0, shift)
        found = other if other[0] < found[0] - WORTH else found
    return found[2], found[1]


def _smallest_matching_Z(steps, ends, shift, slack, Z_max, enough, first_guess: float, unit: float):
    """Best shifts for each Z of a coarse grid; the smallest Z within the slack, then closer by bisection.

    The guess is of all three shifts, in units in which the search walks. Returns distance, Z and shifts.
    """

    def match(Z: float, start=(first_guess * unit,) * 3) -> tuple[float, float, tuple[float, float, float]]:
        starts = stage_starts(ends, Z)
        target, bounds = _target(ends, starts, shift), shift_bounds(shift)
        distance, shifts = _best_shifts(steps, ends, starts, target, start, bounds, unit)
        return distance, Z, shifts

    tried = [match(Z) for Z in np.geomspace(Z_MIN, Z_max, 13).tolist()]
    enough = max(enough, (1 + slack) * min(distance for distance, _, _ in tried))
    first = next(i for i, (distance, _, _) in enumerate(tried) if distance <= enough)
    good, worse = tried[first], tried[max(first - 1, 0)][1]
    for _ in range(5 if first else 0):
        middle = match((worse + good[1]) / 2, good[2])
        good, worse = (middle, worse) if middle[0] <= enough else (good, middle[1])
    return good


def _best_shifts(steps, ends, starts, target, start, bounds, unit: float) -> tuple[float, tuple[float, float, float]]:
    weights = np.asarray(steps) / sum(steps)

    def objective(shifts):
        stages = zip(weights, shifts * unit, starts, ends, strict=True)
        return _distance(sum(w * density(h, s, e) for w, h, s, e in stages), target)

    low, high = (bound / unit for bound in bounds)
    found = minimize(objective, [h / unit for h in start], method="L-BFGS-B", bounds=[(low, high)] * 3)
    return found.fun, tuple((found.x * unit).tolist())


def at_bound(schedule: Schedule, Z_max: float = Z_MAX) -> list[str]:
    """Which parameters the search left on a bound, where its answer says little."""
    bounds = {f"h_{k + 1}": (h, *shift_bounds(schedule.shift)) for k, h in enumerate(schedule.shifts)}
    bounds["Z"] = (schedule.Z, Z_MIN, Z_max)
    return [name for name, (value, low, high) in bounds.items() if not low * 1.001 < value < high * 0.999]


def scheduler_shift(scheduler, tokens: int) -> float:
    """The shift h that a flow scheduler really uses for an image of so many tokens.

    Dynamic shifting counts, which the public code leaves out: FLUX.1-dev at 1024 x 1024 has 3.158, not 3. Stretching
    the grid to a last sigma above 0 (`shift_terminal` of Qwen-Image) does not.

    Raises:
        ValueError: the scheduler's config has neither a static shift nor a dynamic one, or one without end.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
        if config.get("time_shift_type", "exponential") != "exponential":
            return mu
        try:
            return math.exp(mu)
        except OverflowError:
            raise ValueError(
                f"{tokens} image tokens: the scheduler shifts by e^{mu:.0f}; take a smaller size."
            ) from None
    shift = config.get("shift", config.get("flow_shift"))
    if shift is None:
        raise ValueError(f"{type(scheduler).__name__} has no shift in its config; pass shift=.")
    return float(shift)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and presets
# ---------------------------------------------------------------------------------------------------------------------


def check_Z(Z: float) -> None:
    """Raises ValueError for c = 0, and c > 1/4, for which the noise of a block of four copies has no covariance."""
    if not math.inf > Z:
        raise ValueError(f"Z={Z}: expected a finite number.")
    if not Z >= Z_MIN:
        raise ValueError(f"Z={Z}, c={1 / Z**2 if Z else math.inf:.4g}: expected Z at least 2, that is c at most 1/4.")


def check_stages(steps: Sequence[int], ends: Sequence[float], ratio: float) -> None:
    """Raises ValueError unless these are three stages that rise to 1, with a ratio in (0, 1)."""
    if not all(isinstance(values, Sequence) and len(values) == 3 for values in (steps, ends)):
        raise ValueError(f"steps={steps}, ends={ends}: expected three stages in lists, each with a step count.")
    if any(not isinstance(n, Integral) or n < 1 for n in steps):
        raise ValueError(f"steps={tuple(steps)}: expected whole numbers of at least 1.")
    if ends[-1] != 1:
        raise ValueError(f"ends={tuple(ends)}: the last stage has to end at 1, at the finished picture.")
    if not all(end - start >= NARROWEST for start, end in zip((0, *ends), ends, strict=False)):
        raise ValueError(f"ends={tuple(ends)}: expected times that rise from above 0 to 1, by {NARROWEST:g} or more.")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio}: expected a share between 0 and 1, both excluded.")


# Shifts and Z as the public code has them, or as its search gives them: Table S1 has slips in SD3's (6.21, 2.23).
# The 7x ratio is the code's 0.1, with which the published FLOPs were made; the paper's text says 0.2.
# The 4-step preset is published without shifts and Z: solved for the true shift 1 of schnell, where Z stays at 2.
PRESETS: dict[str, Schedule] = {
    "4x": Schedule((5, 6, 7), (0.3, 0.45, 1.0), 0.3, (5.019, 2.589, 2.226), 6.317),
    "5x": Schedule((4, 5, 6), (0.3, 0.45, 1.0), 0.2, (5.115, 2.642, 2.254), 7.522),
    "7x": Schedule((2, 3, 5), (0.2, 0.3, 1.0), 0.1, (8.141, 2.856, 2.193), 6.261),
    "2x": Schedule((5, 6, 9), (0.2, 0.3, 1.0), 0.3, (6.121, 2.237, 1.973), 4.132),
    "3x": Schedule((3, 3, 6), (0.25, 0.3, 1.0), 0.2, (6.401, 2.601, 2.273), 6.258),
    "turbo": Schedule((1, 1, 2), (0.3, 0.45, 1.0), 0.3, (1.008, 0.568, 0.864), 2.0, shift=1.0),
}
