"""What a cascade will do and cost, for published models, without loading any weights.

    report = explain("flux", (1024, 2048, 4096), preset="code")
    report["tflops"]["total"], report["memory_gib"]

`report` is plain JSON:

    {"stages": [{"size", "steps", "sigmas", "guidance_scale", "cutoff", "alpha", "beta", ...}, ...],   base first
     "tflops": {"per_stage": [...], "total"},      of the denoiser, every branch of guidance and attention counted
     "memory_gib"}                                 weights in bfloat16 and the hungriest stage, nothing offloaded

`sigmas` has both ends, one more than steps; `alpha` and `beta` are the strengths at a stage's first step; `cutoff` is
null at the base, which has none, and "inf" where no band is left out, for which JSON has no number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from solver.samplers.cost import NETWORKS, Network, image_tokens, run_flops
from solver.samplers.grids import QWEN_SHIFT, latent_diffusion_grid, own_grid, shifted
from solver.samplers.hiflow.memory import GIB, activation_bytes, decoder_bytes
from solver.samplers.hiflow.noise import check_rule
from solver.samplers.hiflow.plan import (
    Recipe,
    Size,
    Stage,
    as_recipe,
    as_size,
    few_tokens,
    ladder,
    plan_stages,
    with_steps,
)

BF16 = 2  # bytes


@dataclass(frozen=True)
class Family:
    """A published model, as far as a plan needs it.

    Attributes:
        network: key of `cost.NETWORKS`.
        parameters: of the denoiser, the text encoders and the autoencoder together, in billions.
        width: of the denoiser's tokens; of a UNet, its first channels.
        guidance_scale: the default of its pipeline.
        sigmas: of a base run, from the number of steps and of the base's image tokens.
        condition: pixels of an image to edit that runs along.
        largest: pixels a side that it has positions for.
        distilled: whether the model is told its guidance scale, so that the recipe has one for each stage.
        steps: of a base run of a model that was distilled to few; of others the preset says it.
        side: of the base, in pixels.
    """

    network: str
    parameters: float
    width: int
    guidance_scale: float
    sigmas: Callable[[int, int], torch.Tensor]
    condition: int = 0
    largest: int | None = None
    distilled: bool = False
    steps: int | None = None
    side: int = 1024

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Where none are given."""
        return ladder((self.side, self.side), self.largest)

    @property
    def unet(self) -> bool:
        return self.network in ("sdxl", "sd1.5")

    @property
    def flux(self) -> bool:
        return self.network.startswith("flux")


DYNAMIC = partial(shifted, use_dynamic_shifting=True)
SHIFT_3 = partial(own_grid, shift=3.0)
FAMILIES = {
    "flux": Family("flux-dev", 16.87, 3072, 3.5, DYNAMIC, distilled=True),
    "flux-kontext": Family("flux-dev", 16.87, 3072, 3.5, DYNAMIC, condition=1024**2, distilled=True),
    "flux-schnell": Family("flux-schnell", 16.86, 3072, 0.0, shifted, steps=4),
    "sd3": Family("sd3-medium", 7.69, 1536, 7.0, SHIFT_3, largest=192 * 16),
    "sd3.5-large": Family("sd3.5-large", 13.72, 2432, 7.0, SHIFT_3, largest=192 * 16),
    "qwen-image": Family("qwen-image", 28.85, 3072, 4.0, partial(shifted, **QWEN_SHIFT)),
    "sdxl": Family("sdxl", 3.47, 320, 5.0, latent_diffusion_grid),
    "sd1.5": Family("sd1.5", 1.07, 320, 7.5, latent_diffusion_grid, side=512),
}


def explain(
    family: str,
    sizes: Sequence[Size] | None = None,
    preset: str | Recipe = "code",
    guidance_scale: float | Sequence[float] | None = None,
    alignment: str = "full",
) -> dict:
    """The plan, its FLOPs and its memory. Arguments as of `hiflow`; a preset by name has the model's own steps.

    Raises:
        ValueError: the family is none of `FAMILIES`, or the plan does not fit together.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: plans without weights are known for {', '.join(FAMILIES)}.")
    model, network = FAMILIES[family], NETWORKS[FAMILIES[family].network]
    sizes = model.sizes if sizes is None else sizes
    recipe = as_recipe(preset)
    if isinstance(preset, str) and model.steps:
        recipe = with_steps(recipe, model.steps)
    check_rule(recipe.acceleration, "epsilon" if model.unet else "flow")
    stages = plan_stages(sizes, recipe, network.pixels, guidance_scale, alignment, model.distilled, model.flux)
    largest = max(stages[-1].height, stages[-1].width)
    if model.largest and largest > model.largest:
        raise ValueError(f"{family} has positions for {model.largest} pixels a side; {largest} were asked for.")

    grid = model.sigmas(recipe.steps, image_tokens(network, *as_size(sizes[0])))
    condition = model.condition // network.pixels**2
    tflops = [stage_flops(network, stage, condition, _branches(model, stage)) / 1e12 for stage in stages]
    return {
        "family": family,
        "start": recipe.start,
        "stages": [_as_json(stage, model, grid) for stage in stages],
        "tflops": {"per_stage": tflops, "total": sum(tflops)},
        "memory_gib": max(_memory_bytes(model, network, stage, condition) for stage in stages) / GIB,
    }


def _as_json(stage: Stage, model: Family, grid: torch.Tensor) -> dict:
    guidance = model.guidance_scale if stage.guidance_scale is None else stage.guidance_scale
    return {
        "size": stage.height if stage.height == stage.width else [stage.height, stage.width],
        "steps": stage.steps,
        "sigmas": grid[stage.first :].tolist(),
        "guidance_scale": guidance,
        "cutoff": "inf" if stage.cutoff == math.inf else stage.cutoff,
        "alpha": stage.alpha,
        "beta": stage.beta,
        "ntk_factor": stage.ntk_factor,
        "text_copies": stage.text_copies[0] * stage.text_copies[1],
        "proportional_attention": stage.proportional_attention,
        "shifted_patches": stage.shifted_patches,
        "edges_first": {"steps": stage.edge_steps, "ratio": stage.edge_ratio} if stage.edge_steps else None,
    }


def _branches(model: Family, stage: Stage) -> int:
    """Evaluations a step: two with guidance, unless the model is told its scale."""
    guidance = model.guidance_scale if stage.guidance_scale is None else stage.guidance_scale
    return 1 + (guidance > 1 and not model.distilled)


def stage_flops(network: Network, stage: Stage, condition: int = 0, branches: int = 1) -> float:
    """Of the denoiser in a stage, with all that its changes inside the network cost.

    Args:
        network: its coefficients.
        condition: tokens of an image to edit.
        branches: evaluations a step.
    """
    tokens = image_tokens(network, stage.height, stage.width)
    rows, columns = stage.height // network.pixels, stage.width // network.pixels
    whole = range(stage.edge_steps, stage.steps)
    shifted = sum(step % 2 == 0 for step in whole) if stage.shifted_patches else 0
    evaluations = [
        ((rows + 1) * (columns + 1) + condition, shifted),
        (tokens + condition, len(whole) - shifted),
    ]
    if stage.edge_steps:
        evaluations.append((few_tokens(tokens, stage.edge_ratio) + condition, stage.edge_steps))
    text = network.text_tokens * stage.text_copies[0] * stage.text_copies[1]
    return run_flops(network, evaluations, text, branches=branches)


def _rows(model: Family, stage: Stage) -> int:
    """Rows of one evaluation: FLUX and Qwen-Image evaluate the branches of guidance one by one."""
    return 1 if model.flux or model.network == "qwen-image" else _branches(model, stage)


def _memory_bytes(model: Family, network, stage: Stage, condition: int) -> float:
    tokens = image_tokens(network, stage.height, stage.width) + condition
    if not model.unet:
        tokens += network.text_tokens * stage.text_copies[0] * stage.text_copies[1]
    denoising = activation_bytes(tokens * _rows(model, stage), model.width, BF16, model.unet)
    return model.parameters * 1e9 * BF16 + max(denoising, decoder_bytes(stage.height, stage.width, BF16))


def as_table(report: dict) -> str:
    """The report for people."""
    head = f"{'size':>11} {'steps':>5} {'σ':>14} {'guidance':>8} {'cutoff':>6} {'α':>5} {'β':>5} {'TFLOPs':>9}"
    rows = [head]
    for stage, cost in zip(report["stages"], report["tflops"]["per_stage"], strict=True):
        size = stage["size"] if isinstance(stage["size"], list) else [stage["size"]] * 2
        span = f"{stage['sigmas'][0]:.3f} → {stage['sigmas'][-1]:.3f}"
        cutoff = "" if stage["cutoff"] is None else f"{float(stage['cutoff']):g}"
        rows.append(
            f"{size[0]:>5} x {size[1]:<3} {stage['steps']:>5} {span:>14} {stage['guidance_scale']:>8g} {cutoff:>6} "
            f"{stage['alpha']:>5g} {stage['beta']:>5g} {cost:>9,.0f}"
        )
        if few := stage["edges_first"]:
            rows.append(f"{'':>11} {few['steps']:>5} of these, with all tokens for {few['ratio']:.0%} of the picture")
    rows.append(f"total {report['tflops']['total']:,.0f} TFLOPs, about {report['memory_gib']:.0f} GiB in bfloat16")
    return "\n".join(rows)
