"""Which sizes, in how many steps, with what strengths: HiFlow's plan, before anything is run.

    stages = plan_stages((1024, 2048, 4096), PRESETS["code"], multiple=16)
    sigmas = grid[stages[1].first :]    # the larger stages walk the tail of the base grid, which is never re-shifted

Two recipes are known, of the public code and of the paper, and they disagree on almost every number; both are here.
Change one with `dataclasses.replace(PRESETS["code"], cutoff=(0.3,))`. Where a recipe has a number for each larger
stage, the last one serves all stages after it.

Source: arXiv 2504.06232 (2048² and 4096² from FLUX.1-dev) and its public code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from solver.samplers.cost import LARGEST_SIDE
from solver.samplers.hiflow.alignment import ACCELERATION_RULES
from solver.samplers.ralu.edges import number_of_fine

ALIGNMENTS = ("none", "init", "init+direction", "full")  # the rows of the paper's ablation
STARTS = ("image", "prediction")

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """HiFlow's numbers. Tuples have one entry a larger stage.

    Attributes:
        steps: of the base stage, N.
        stage_steps: K: how many of the last steps of the base grid a stage takes. None where `tau` says it.
        tau: K / N instead, in (0, 1): the paper's, read as a share of the steps. It is no σ: as such it would be far
            less noise (0.6 of 30 steps begins at σ = 0.83 on FLUX's grid).
        guidance_scales: of FLUX.1-dev's distilled guidance, base first. Other models keep their pipeline's own.
        cutoff: of the low-pass filter, in Nyquist frequencies of the stage's latents.
        alpha, beta: strength of the direction and of the acceleration alignment at a stage's first step; both fall
            linearly to 1/K of it at the last.
        start: what is enlarged and noised: the finished "image" (in pixels, sharpened), or the "prediction" of x_0
            that the stage before had at the noise level of the start (in latents).
        acceleration: one of `ACCELERATION_RULES`.
        ntk_factor: of the rotary base; 1 changes nothing. This and what follows is for FLUX-type transformers only.
        proportional_attention: whether logits grow with the number of keys.
        text_copies: whether the text comes once a base-size tile of the image.
        shifted_patches: whether the patch grid moves at every other step.
        edges_first: (share of the last stage's steps, share of the picture): in so many of its first steps, only so
            much of the picture, where the smaller one has edges, has all its tokens (`hiflow.edges_first`). None for
            all of it.
    """

    steps: int = 30
    stage_steps: tuple[int, ...] | None = None
    tau: tuple[float, ...] | None = None
    guidance_scales: tuple[float, ...] | None = None
    cutoff: tuple[float, ...] = (0.2,)
    alpha: tuple[float, ...] = (1.0,)
    beta: tuple[float, ...] = (1.0,)
    start: str = "image"
    acceleration: str = "code"
    ntk_factor: tuple[float, ...] = (1.0,)
    proportional_attention: bool = False
    text_copies: bool = False
    shifted_patches: bool = False
    edges_first: tuple[float, float] | None = None


PRESETS = {
    "code": Recipe(
        stage_steps=(16, 10),
        guidance_scales=(3.5, 4.5, 6.0),
        cutoff=(0.2,),
        alpha=(1.0, 0.25),
        beta=(0.5,),
        start="image",
        ntk_factor=(10.0,),
        proportional_attention=True,
        shifted_patches=True,
    ),
    "paper": Recipe(
        tau=(0.6, 0.3),
        guidance_scales=(3.5, 4.5, 6.0),  # the paper states none; these are the code's
        cutoff=(0.4,),
        alpha=(1.0,),
        beta=(1.0,),
        start="prediction",
        acceleration="eq13",
        ntk_factor=(10.0,),
        proportional_attention=True,
        text_copies=True,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One size of the cascade.

    Attributes:
        height, width: in pixels.
        first, stop: it walks the steps first .. stop-1 of the base grid, which has `stop` of them.
        guidance_scale: None for the pipeline's own.
        cutoff: None at the base.
        alpha, beta: strengths at the first step, 0 at the base.
        ntk_factor: of the rotary base.
        text_copies: (r_h, r_w).
        proportional_attention, shifted_patches: as in `Recipe`, off at the base.
        edge_steps, edge_ratio: in how many of its first steps what share of its cells has all its tokens.
    """

    height: int
    width: int
    first: int
    stop: int
    guidance_scale: float | None
    cutoff: float | None = None
    alpha: float = 0.0
    beta: float = 0.0
    ntk_factor: float = 1.0
    text_copies: tuple[int, int] = (1, 1)
    proportional_attention: bool = False
    shifted_patches: bool = False
    edge_steps: int = 0
    edge_ratio: float = 0.0

    @property
    def steps(self) -> int:
        return self.stop - self.first

    def ramp(self, strength: float) -> tuple[float, ...]:
        """A (K - k) / K for k = 0 .. K-1: t / τ of the paper, on the unshifted grid."""
        return tuple(strength * (self.steps - k) / self.steps for k in range(self.steps))


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of base steps; the larger stages take the same share of them, at least one."""
    if recipe.stage_steps is None:
        return replace(recipe, steps=steps)
    scaled = tuple(max(1, round(count * steps / recipe.steps)) for count in recipe.stage_steps)
    return replace(recipe, steps=steps, stage_steps=scaled)


def with_changes(recipe: Recipe, **changes) -> Recipe:
    """`dataclasses.replace` without what is None; of `stage_steps` and `tau` the new one takes the place of the other.

    Raises:
        ValueError: both are given.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if "stage_steps" in changes and "tau" in changes:
        raise ValueError(f"stage_steps={changes['stage_steps']}, tau={changes['tau']}: give one of the two.")
    other = {"stage_steps": "tau", "tau": "stage_steps"}
    return replace(recipe, **dict.fromkeys(other[name] for name in changes if name in other), **changes)


def as_recipe(preset: str | Recipe) -> Recipe:
    """A recipe by its name, or as it is.

    Raises:
        ValueError: no preset has that name.
    """
    if isinstance(preset, Recipe):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected {', '.join(map(repr, PRESETS))}, or a Recipe.")
    return PRESETS[preset]


def plan_stages(
    sizes: Sequence[Size],
    recipe: Recipe,
    multiple: int | None,
    guidance_scale: float | Sequence[float] | None = None,
    alignment: str = "full",
    distilled_guidance: bool = True,
    model_patches: bool = True,
    known: tuple[int, int] | None = None,
) -> list[Stage]:
    """The stages of a run, base first.

    Args:
        sizes: of the pictures, in pixels, ascending: sides of squares, or (height, width). The first is the base.
        recipe: HiFlow's numbers.
        multiple: of which heights and widths have to be, in pixels. None where the model is not known yet: then
            neither that nor proportions are checked.
        guidance_scale: one for all stages or one a stage; None takes the recipe's where `distilled_guidance`, and the
            pipeline's own elsewhere.
        alignment: one of `ALIGNMENTS`. "none" is the largest size alone, from noise, in all the base's steps; "init"
            has no guidance along the way.
        distilled_guidance: whether the model is told its guidance scale, as FLUX.1-dev is.
        model_patches: whether the model takes the recipe's changes inside the transformer.
        known: height and width that the model is made for, where the first size is that of a given image, which may
            be smaller or larger; None where it is the model's own. Only stages above it change the transformer.

    Raises:
        ValueError: sizes that do not ascend, do not divide or change their proportions, more steps than the stage
            before has, numbers out of their ranges.
    """
    _check_recipe(recipe)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment={alignment!r}: expected one of {', '.join(map(repr, ALIGNMENTS))}.")
    pixels = _check_sizes(sizes, multiple)
    steps = [recipe.steps, *_stage_steps(recipe, len(pixels) - 1)]
    guidance = _guidance_scales(recipe if distilled_guidance else None, guidance_scale, len(pixels))
    base = known_size(pixels[0], known, multiple)
    stages = [Stage(*pixels[0], first=0, stop=recipe.steps, guidance_scale=guidance[0])]
    for i, (height, width) in enumerate(pixels[1:]):
        patches = {
            "ntk_factor": _entry(recipe.ntk_factor, i),
            "text_copies": (max(1, height // base[0]), max(1, width // base[1])) if recipe.text_copies else (1, 1),
            "proportional_attention": recipe.proportional_attention,
            "shifted_patches": recipe.shifted_patches,
        }
        stage = Stage(
            height,
            width,
            first=recipe.steps - steps[i + 1],
            stop=recipe.steps,
            guidance_scale=guidance[i + 1],
            cutoff=_entry(recipe.cutoff, i),
            alpha=_entry(recipe.alpha, i) if alignment in ("init+direction", "full") else 0.0,
            beta=_entry(recipe.beta, i) if alignment == "full" else 0.0,
            **patches if model_patches and height * width > base[0] * base[1] else {},
        )
        stages.append(stage)
    if recipe.edges_first:
        if alignment == "none" or len(stages) == 1:
            raise ValueError("edges_first looks for edges in a smaller picture, and there is none.")
        stages[-1] = _edges_first(stages[-1], *recipe.edges_first, multiple, model_patches)
    return [replace(stages[-1], first=0)] if alignment == "none" else stages


def _edges_first(stage: Stage, share: float, ratio: float, multiple: int | None, model_patches: bool) -> Stage:
    """The last stage with few tokens in its first steps."""
    if not model_patches:
        raise ValueError("edges_first mixes the tokens of FLUX-type transformers; this model has others or none.")
    if multiple is None:
        return stage
    if stage.height % (2 * multiple) or stage.width % (2 * multiple):
        raise ValueError(
            f"edges_first: {stage.height} x {stage.width} has to divide into cells of {2 * multiple} pixels."
        )
    number_of_fine(ratio, stage.height * stage.width // (2 * multiple) ** 2)  # raises where there is none
    return replace(stage, edge_steps=max(1, round(share * stage.steps)), edge_ratio=ratio)


def few_tokens(tokens: int, ratio: float) -> int:
    """Of a picture of so many, where a share of its cells has four each and the others have one."""
    cells = tokens // 4
    return cells + 3 * number_of_fine(ratio, cells)


def ladder(base: tuple[int, int], largest: int | None = None) -> list[tuple[int, int]]:
    """A size, twice and four times it a side, as far as a model has positions: `largest` pixels a side."""
    sizes = [(base[0] * times, base[1] * times) for times in (1, 2, 4)]
    return [size for size in sizes if largest is None or max(size) <= largest]


def known_size(first: tuple[int, int], known: tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """What the large stages refer to, for the shift of the grid, the keys of attention and the copies of the text: the
    first size, or, where that is of a given image and not what the model knows, the known area in its proportions.
    """
    if known is None or first[0] * first[1] == known[0] * known[1]:
        return first
    scale = math.sqrt(known[0] * known[1] / (first[0] * first[1]))
    return tuple(max(1, round(side * scale / multiple)) * multiple for side in first)


def as_size(size: Size) -> tuple[int, int]:
    """Height and width. Raises ValueError if it is neither whole pixels nor two of them."""
    sides = (size, size) if isinstance(size, Integral) else size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
        raise ValueError(f"size {size!r}: expected whole pixels, or (height, width).")
    return int(sides[0]), int(sides[1])


def _entry(values: tuple, i: int):
    return values[min(i, len(values) - 1)]


def _stage_steps(recipe: Recipe, stages: int) -> list[int]:
    """K of each larger stage."""
    if recipe.tau is not None:
        counts = [max(1, round(_entry(recipe.tau, i) * recipe.steps)) for i in range(stages)]
    else:
        counts = [_entry(recipe.stage_steps, i) for i in range(stages)]
    before = recipe.steps
    for i, count in enumerate(counts):
        if not 1 <= count <= before:
            raise ValueError(
                f"Stage {i + 1} has {count} steps, but the stage before it has {before}: a stage follows the "
                "predictions of the one before, step for step, so it takes 1 step to as many as that one. With fewer "
                "base steps use with_steps(recipe, steps), or give stage_steps."
            )
        before = count
    return counts


def _guidance_scales(recipe: Recipe | None, given: float | Sequence[float] | None, stages: int) -> list[float | None]:
    if given is None:
        if recipe is None or recipe.guidance_scales is None:
            return [None] * stages
        return [_entry(recipe.guidance_scales, i) for i in range(stages)]
    scales = [given] * stages if isinstance(given, Real) else list(given) if isinstance(given, Sequence) else [given]
    if len(scales) != stages or not all(isinstance(value, Real) and 0 <= value < math.inf for value in scales):
        raise ValueError(f"guidance_scale {given!r}: expected a number from 0 on, or one for each of {stages} stages.")
    return [float(value) for value in scales]


def _check_sizes(sizes: Sequence[Size], multiple: int | None) -> list[tuple[int, int]]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise ValueError(f"sizes={sizes!r}: expected a sequence such as (1024, 2048), the base size first.")
    pixels = [as_size(size) for size in sizes]
    for height, width in pixels:
        if not all(0 < side <= LARGEST_SIDE and side % (multiple or 1) == 0 for side in (height, width)):
            shown = " x ".join(str(side) if abs(side) < 10**9 else "..." for side in (height, width))
            numbers = f"multiples of {multiple}" if multiple else "numbers"
            raise ValueError(f"size {shown}: height and width have to be positive {numbers}, at most {LARGEST_SIDE}.")
    base_height, base_width = pixels[0]
    for i, (height, width) in enumerate(pixels[1:]):
        before = pixels[i]
        if height < before[0] or width < before[1] or (height, width) == before:
            raise ValueError(
                f"sizes have to ascend, but {height} x {width} comes after {before[0]} x {before[1]}. "
                "The first is the size that the model knows."
            )
        # Half a multiple of rounding in each side is what sizes of equal proportions can differ by.
        skew = abs(height * base_width - width * base_height)
        if multiple is not None and skew > multiple * max(base_height, base_width) / 2:
            raise ValueError(
                f"{height} x {width} has other proportions than the base, {base_height} x {base_width}: the larger "
                "picture is the smaller one enlarged."
            )
    return pixels


def _check_recipe(recipe: Recipe) -> None:
    if not _is_number(recipe.steps, Integral) or recipe.steps < 1:
        raise ValueError(f"steps={recipe.steps}: the base needs a whole number, at least 1.")
    if (recipe.stage_steps is None) == (recipe.tau is None):
        raise ValueError(
            f"stage_steps={recipe.stage_steps}, tau={recipe.tau}: give one of the two, as a number a larger stage."
        )
    for name in ("stage_steps", "tau", "guidance_scales", "cutoff", "alpha", "beta", "ntk_factor"):
        if (values := getattr(recipe, name)) is not None and (not isinstance(values, tuple) or not values):
            raise ValueError(f"{name}={values!r}: expected a tuple with a number a larger stage, such as (0.2,).")
        kind, words = (Integral, "whole numbers") if name == "stage_steps" else (Real, "numbers")
        if not all(_is_number(value, kind) and not math.isnan(value) for value in values or ()):
            raise ValueError(f"{name}={values!r}: expected {words}.")
    ranges = {
        "tau": (
            lambda value: 0 < value < 1,
            "between 0 and 1, both excluded: the share of the steps that is run again",
        ),
        "cutoff": (lambda value: value > 0, "above 0, in Nyquist frequencies; alpha=(0,) switches the direction off"),
        "guidance_scales": (lambda value: 0 <= value < math.inf, "from 0 on"),
        "alpha": (lambda value: 0 <= value <= 1, "in [0, 1]"),
        "beta": (lambda value: 0 <= value <= 1, "in [0, 1]"),
        "ntk_factor": (lambda value: 0 < value < math.inf, "above 0; 1 changes nothing"),
    }
    for name, (allowed, words) in ranges.items():
        for value in getattr(recipe, name) or ():
            if not allowed(value):
                raise ValueError(f"{name}={value}: expected a number {words}.")
    shares = recipe.edges_first
    if shares is not None and not (
        isinstance(shares, tuple)
        and len(shares) == 2
        and all(_is_number(share, Real) for share in shares)
        and 0 < shares[0] <= 1
        and 0 < shares[1] < 1
    ):
        raise ValueError(
            f"edges_first={shares!r}: expected (share of the last stage's steps, up to 1; share of the picture, below "
            "1), such as (0.5, 0.3)."
        )
    for name, known in (("start", STARTS), ("acceleration", ACCELERATION_RULES)):
        if getattr(recipe, name) not in known:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: expected one of {', '.join(map(repr, known))}.")
    for name in ("proportional_attention", "text_copies", "shifted_patches"):
        if not isinstance(getattr(recipe, name), bool):
            raise ValueError(f"{name}={getattr(recipe, name)!r}: expected True or False.")


def _is_number(value, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
