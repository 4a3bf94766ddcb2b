"""The rows of HiFlow's table, and how their pictures are made from one base run."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from evaluation.solvers import load_solver
from solver.samplers.calls import text_length
from solver.samplers.cost import network_of
from solver.samplers.hiflow import HiFlowResult, Recipe, hiflow, with_steps
from solver.samplers.hiflow.alignment import ACCELERATION_RULES, enlarge, sharpen
from solver.samplers.hiflow.explain import stage_flops
from solver.samplers.hiflow.noise import prediction_type, stage_solver
from solver.samplers.hiflow.plan import PRESETS, Stage, plan_stages
from solver.samplers.latents import has_flux_transformer, patch_size, vae_factor

FEW = (5, 8)  # steps of the base; larger stages have their share
STOCK, DIRECT, BICUBIC, FULL = "stock", "direct", "bicubic", "full"
SHARPENED = "sharpened"  # a bicubic picture, as HiFlow sharpens it before it puts noise on it
ENLARGED = (None, SHARPENED)  # alignments of rows without a network


class Row(NamedTuple):
    """One way to a large picture.

    Attributes:
        name: in the table.
        alignment: of `hiflow`; None where the base picture is only enlarged, `SHARPENED` where it is sharpened too,
            `STOCK` for the pipeline by itself.
        recipe: likewise.
        scheduler: of all stages, the base's too, which is then the row's own; None for the pipeline's, after the
            shared base.
    """

    name: str
    alignment: str | None
    recipe: Recipe
    scheduler: SchedulerMixin | None = None


def main_rows(recipe: Recipe) -> list[Row]:
    """The paper's ablation and what it is compared with.

    Direct generation is the last size from noise on the base's grid, with the recipe's changes inside the network and
    its guidance; stock is the pipeline's own call, which knows nothing of the base.
    """
    return [
        Row(STOCK, STOCK, recipe),
        Row(DIRECT, "none", recipe),
        Row(BICUBIC, None, recipe),
        Row(f"{BICUBIC}, {SHARPENED}", SHARPENED, recipe),
        Row("A_i", "init", recipe),
        Row("A_i + A_d", "init+direction", recipe),
        Row(FULL, "full", recipe),
    ]


def variants(group: str, recipe: Recipe, pipe: DiffusionPipeline, sizes: Sequence[int]) -> list[Row]:
    """The full method with other numbers, as far as they make a difference to the pipeline at these sizes.

    Args:
        group: a key of `GROUPS`.
        recipe: that of the main rows.
        pipe: for a UNet there are no changes inside the network.
        sizes: in pixels, base first.
    """
    changed = {label: replace(recipe, **change) for label, change in GROUPS[group].items()}
    if group == "presets":
        changed = {name: with_steps(preset, recipe.steps) for name, preset in PRESETS.items()}
    if group in ("network", "edges") and not has_flux_transformer(pipe):
        changed = {}
    if prediction_type(pipe.scheduler) != "flow":
        changed = {label: other for label, other in changed.items() if other.acceleration != "fixed-noise"}
    rows, known = [], [_numbers(recipe, sizes, pipe)]
    for label, other in changed.items():
        if (numbers := _numbers(other, sizes, pipe)) not in known:
            known.append(numbers)
            rows.append(Row(label, "full", other))
    return rows


def few_steps(recipe: Recipe, pipe: DiffusionPipeline, solver: str, guidance_scale: float) -> list[Row]:
    """The full method in few steps of every stage, with the pipeline's own solver and with a learned one.

    Args:
        recipe: that of the main rows.
        pipe: of the noise schedule that the solver was learned on.
        solver: folder of the learned one.
        guidance_scale: that its policy is told.
    """
    learned = load_solver(solver, pipe.scheduler)
    learned.guidance_scale = guidance_scale
    solvers = {"": stage_solver(pipe, None), ", learned": learned}
    return [
        Row(f"{FULL}, {steps} steps{name}", "full", with_steps(recipe, steps), scheduler)
        for steps in FEW
        for name, scheduler in solvers.items()
    ]


def _numbers(recipe: Recipe, sizes: Sequence[int], pipe: DiffusionPipeline) -> tuple:
    """What of a recipe counts at these sizes."""
    return plan_stages(sizes, recipe, token_side(pipe)), recipe.start, recipe.acceleration


def token_side(pipe: DiffusionPipeline) -> int:
    """In pixels."""
    return vae_factor(pipe) * patch_size(pipe)


GROUPS = {
    "presets": {},
    "start": {f"start {value}": {"start": value} for value in ("image", "prediction")},
    "acceleration": {f"acceleration {rule}": {"acceleration": rule} for rule in ACCELERATION_RULES},
    "cutoff": {f"cutoff {value}": {"cutoff": (value,)} for value in (0.1, 0.2, 0.3, 0.4, 0.6)},
    "alpha": {f"alpha {value}": {"alpha": (value,)} for value in (0.25, 0.5, 1.0)},
    "beta": {f"beta {value}": {"beta": (value,)} for value in (0.25, 0.5, 1.0)},
    "network": {
        "ntk 1": {"ntk_factor": (1.0,)},
        "ntk 4": {"ntk_factor": (4.0,)},
        "plain attention": {"proportional_attention": False},
        "patches in place": {"shifted_patches": False},
    },
    "edges": {
        f"edges first, {ratio:.0%} in {share:.0%} of the steps": {"edges_first": (share, ratio)}
        for share, ratio in ((0.5, 0.3), (0.5, 0.15), (0.75, 0.3), (1.0, 0.3))
    },
}


class Artist:
    """Makes the pictures of a batch, row by row; the base run is made once.

    Args:
        pipe: the pipeline.
        sizes: in pixels, base first.
        guidance_scale: one, or one a stage.
    """

    def __init__(self, pipe: DiffusionPipeline, sizes: Sequence[int], guidance_scale: float | list[float]):
        self.pipe, self.sizes, self.guidance_scale = pipe, tuple(sizes), guidance_scale
        self.call = text_length(pipe)

    def evaluations(self, row: Row) -> Iterator[tuple[int, int]]:
        """(size, evaluations of the network) of each of the row's stages after a shared base, guidance included."""
        if row.alignment in ("none", STOCK):
            yield from ((size, row.recipe.steps) for size in self.sizes[1:])
        elif row.alignment not in ENLARGED:
            for stage in plan_stages(self.sizes, row.recipe, 1)[row.scheduler is None :]:
                yield stage.height, stage.steps

    def gflops(self, row: Row, size: int) -> float | None:
        """Of one branch of the network at a size, for one picture; None of a UNet, whose cost is not counted here."""
        if not has_flux_transformer(self.pipe):
            return None
        network = network_of(self.pipe.transformer, token_side(self.pipe), self.call.get("max_sequence_length"))
        if row.alignment == STOCK:
            return stage_flops(network, Stage(size, size, 0, row.recipe.steps, None)) / 1e9
        if row.alignment in ENLARGED:
            return 0.0
        sizes = (self.sizes[0], size) if row.alignment == "none" else self.sizes
        stages = plan_stages(sizes, row.recipe, token_side(self.pipe), alignment=row.alignment)
        return sum(stage_flops(network, stage) for stage in stages if stage.height == size) / 1e9

    def seconds_per_evaluation(self, recipe: Recipe, size: int, steps: int = 2, pictures: int = 2) -> float:
        """Of one picture, its share of the decoding included; the second of two small runs."""
        given = {"guidance_scale": self.guidance_scale, "alignment": "none", "call": self.call}
        if isinstance(self.guidance_scale, list):
            given["guidance_scale"] = self.guidance_scale[-1]
        for repeat in range(2):
            batch = pictures if repeat else 1
            start = time.perf_counter()
            hiflow(self.pipe, ["a red ring"] * batch, range(batch), (size,), with_steps(recipe, steps), **given)
        return (time.perf_counter() - start) / steps / pictures

    def base(self, recipe: Recipe, prompts: Sequence[str], seeds: Sequence[int]) -> HiFlowResult:
        """The pictures of the first size, and the predictions that the large ones follow."""
        given = {"guidance_scale": self._first_guidance, "call": self.call}
        return hiflow(self.pipe, prompts, seeds, self.sizes[:1], recipe, **given)

    @property
    def _first_guidance(self) -> float:
        return self.guidance_scale[0] if isinstance(self.guidance_scale, list) else self.guidance_scale

    def draw(self, row: Row, base: HiFlowResult, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """float (B, 3, H, W) in [0, 1] for each of the larger sizes."""
        if row.alignment in ENLARGED:
            large = [enlarge(base.images[0], size, size) for size in self.sizes[1:]]
            return [(sharpen(x) if row.alignment == SHARPENED else x).clamp(0, 1) for x in large]
        if row.alignment == STOCK:
            given = {"guidance_scale": self._first_guidance, "call": self.call}
            return [
                hiflow(self.pipe, prompts, seeds, (size,), row.recipe, **given).images[0] for size in self.sizes[1:]
            ]
        given = {"guidance_scale": self.guidance_scale, "alignment": row.alignment, "call": self.call}
        if row.scheduler is not None:
            given["scheduler"] = row.scheduler
            return hiflow(self.pipe, prompts, seeds, self.sizes, row.recipe, **given).images[1:]
        if row.alignment != "none":
            result = hiflow(self.pipe, prompts, seeds, self.sizes, row.recipe, smaller=base, **given)
            return result.images[1:]
        drawn = []
        for i, size in enumerate(self.sizes[1:], 1):
            if isinstance(self.guidance_scale, list):
                given["guidance_scale"] = [self.guidance_scale[0], self.guidance_scale[i]]
            sizes = (self.sizes[0], size)
            drawn += hiflow(self.pipe, prompts, seeds, sizes, row.recipe, **given).images
        return drawn
