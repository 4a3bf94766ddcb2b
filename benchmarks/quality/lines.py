"""Lines of a table: a row's cost, its estimates by metric, and the paired differences to the row it is compared with.

Shape suffixes: N pictures, P prompts, S seeds of a prompt, M reference pictures, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor

from benchmarks.quality.study import AGREEMENT, Measured, Study
from evaluation import bootstrap
from evaluation.bootstrap import Estimate
from evaluation.instruments import CAPTION_CHECK, SCORE
from evaluation.metrics import frechet, spearman, top1_agreement
from solver.samplers.calls import text_length
from solver.samplers.cost import Network, evaluation_flops, network_of
from solver.samplers.latents import patch_size, vae_factor

FRECHET_FULL, FRECHET_SCENES = "frechet_full", "frechet_scenes"
# name -> unit, in the order of the table
METRICS = {
    "pixels": "PSNR, dB",
    "ssim": "%",
    "dino": "(cos + 1) · 50",
    "dino_patches": "(cos + 1) · 50",
    "clip": "(cos + 1) · 50",
    "depth": "PSNR, dB",
    "segmentation": "% of pixels",
    AGREEMENT: "% same verdict",
    CAPTION_CHECK: "% right",
    "rank": "Spearman's ρ",
    "top1": "share of prompts",
    FRECHET_FULL: "DINO, to the full run",
    FRECHET_SCENES: "DINO, to rendered scenes",
}
LOW_IS_GOOD = (FRECHET_FULL, FRECHET_SCENES)


@dataclass
class Line:
    """A row with its cost and its numbers.

    Attributes:
        gflops: of the denoiser for one picture, attention and both branches of the guidance counted.
        estimates: by metric, in the order of `METRICS`.
        differences: to the row that it is compared with, paired.
    """

    measured: Measured
    gflops: float
    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]

    @property
    def name(self) -> str:
        return self.measured.row.name


def network_of_pipeline(pipe: DiffusionPipeline) -> Network:
    """What its transformer costs, with prompts of the length that its tokenizer is made for."""
    pixels = vae_factor(pipe) * patch_size(pipe)
    return network_of(pipe.transformer, pixels, text_length(pipe).get("max_sequence_length"))


def lines_of(
    study: Study, measured: Sequence[Measured], seeds_each: int = 1, scenes_MD: Tensor | None = None
) -> list[Line]:
    """All lines, the target's first.

    Args:
        study: that was measured.
        measured: its results.
        seeds_each: S; pictures of a prompt follow each other. From 2 on, the ranks of a prompt's seeds by CLIP's score
            are compared too, and estimates are over prompts.
        scenes_MD: DINO's features of rendered scenes; with them there are Fréchet distances.
    """
    network, target, found = network_of_pipeline(study.pipe), measured[0], {}
    for one in measured:
        gflops = sum(count * evaluation_flops(network, tokens) for tokens, count in one.calls.items()) / 1e9
        found[one.row.name] = Line(one, gflops, _estimates(one, target, seeds_each, scenes_MD), {})
    for line in found.values():
        if (other := found.get(line.measured.row.against)) is not None:
            shared = line.estimates.keys() & other.estimates.keys()
            line.differences = {
                name: line.estimates[name] - other.estimates[name] for name in METRICS if name in shared
            }
    return list(found.values())


def _estimates(one: Measured, target: Measured, seeds_each: int, scenes_MD: Tensor | None) -> dict[str, Estimate]:
    def by_prompt(values_N: Tensor) -> Tensor:
        return values_N.unflatten(0, (-1, seeds_each))

    found = {name: bootstrap.mean(by_prompt(one.values[name]).mean(1)) for name in METRICS if name in one.values}
    if seeds_each > 1 and SCORE in one.values:
        scores = by_prompt(one.values[SCORE]), by_prompt(target.values[SCORE])
        found |= {"rank": bootstrap.mean(spearman(*scores)), "top1": bootstrap.mean(top1_agreement(*scores))}
    if scenes_MD is not None:
        found[FRECHET_FULL] = frechet(one.features, target.features, paired=True)
        found[FRECHET_SCENES] = frechet(one.features, scenes_MD, paired=False)
    return {name: found[name] for name in METRICS if name in found}
