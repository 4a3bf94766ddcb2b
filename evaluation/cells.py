"""One cell of the table: a contender at one number of steps and one guidance scale, measured and kept on disk.

Shape suffixes: N prompts, P ranked prompts, S candidates of each.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from evaluation.cache import digest, fingerprint, load, store
from evaluation.config import KEPT_IMAGES
from evaluation.contenders import Contender
from evaluation.instruments import CHECKS, FID, SCORE, Instruments
from evaluation.metrics import spearman, top1_agreement
from evaluation.rendering import Cost, Sampler, Samples
from evaluation.solvers import describe
from evaluation.targets import Target, to_8_bits
from solver.samplers.latents import denoiser


@dataclass
class Cell:
    """What was measured.

    Attributes:
        solver, grid, steps: which.
        guidance_scale: that of the full-step pictures.
        facts: `nfe`, `seconds_per_image`, `solver_share`, `own_guidance_scale`.
        values: metric -> float (N,), or (P,) of the rank metrics: one value a prompt, all averaged later.
        features: of Fréchet distances, name -> (N, D).
        passes: caption or edit check of the candidates, bool (P, S); None where there are no ranks.
        images: uint8, the first `KEPT_IMAGES` pictures.
    """

    solver: str
    grid: str
    steps: int
    guidance_scale: float
    facts: dict
    values: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]
    passes: torch.Tensor | None
    images: torch.Tensor


@dataclass(frozen=True)
class Task:
    """What every cell of a guidance scale is measured on and with.

    Attributes:
        samples, target: the prompts and their full-step pictures.
        instruments: look at previews and targets.
        frechet: the reward whose features are kept for a Fréchet distance.
        ranked, ranked_target: S - 1 more pictures of each of the first P prompts, whose own picture is the first
            candidate; None where ranks are off.
        rank_instruments: look at the candidates.
        candidates: S.
    """

    samples: Samples
    target: Target
    instruments: Instruments
    frechet: str | None = None
    ranked: Samples | None = None
    ranked_target: Target | None = None
    rank_instruments: Instruments | None = None
    candidates: int = 1

    @property
    def num_ranked(self) -> int:
        """P."""
        return len(self.ranked.prompts) // (self.candidates - 1) if self.ranked else 0

    def of_candidates(self, own_P: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """What was seen in the prompts' own pictures and in the others, (P, S)."""
        own_P = own_P[: self.num_ranked]
        return torch.cat([own_P[:, None], more.reshape(len(own_P), -1)], dim=1)


def measure(
    task: Task, contender: Contender, grid: str, steps: int, sampler: Sampler, pipe: DiffusionPipeline, folder: Path
) -> Cell:
    """A cell, from the cache if it is there.

    Args:
        task: what it is measured on.
        contender, grid, steps: the cell.
        sampler: of the contender's network.
        pipe: the model's own pipeline, whose scheduler the contender's starts from.
        folder: of the cache.
    """
    samples = task.samples
    own = sampler.pipe.scheduler if contender.network.get("pipeline") else pipe.scheduler
    guidance = samples.guidance_scale if contender.guidance_scale is None else contender.guidance_scale
    scheduler = contender.grids[grid](own, steps, guidance)
    key = digest(
        {
            "target": task.target.key,
            "prompts": len(samples.prompts),
            "ranked": task.ranked_target and task.ranked_target.key,
            "instruments": [task.instruments.identity, task.rank_instruments and task.rank_instruments.identity],
            "frechet": task.frechet,
            "scheduler": describe(scheduler, steps),
            "network": [*contender.network.items(), _network_digest(contender, sampler)],
            "guidance": [guidance, samples.guidance_scale],
            "steps": steps,
        }
    )
    path = folder / f"{key}.safetensors"
    known = load(path)
    if known is None:
        tensors, facts = _measure(task, scheduler, steps, guidance, sampler)
        facts["solver"] = f"{contender.name}, {grid}, {steps} steps"  # for whoever looks into the cache
        store(path, tensors, facts)
        known = load(path)
    tensors, facts = known
    facts["own_guidance_scale"] = guidance
    values, features = (
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in ("values/", "features/")
    )
    passes = tensors["passes"].bool() if "passes" in tensors else None
    return Cell(
        contender.name, grid, steps, samples.guidance_scale, facts, values, features, passes, tensors["images"]
    )


def _measure(task: Task, scheduler, steps: int, guidance: float, sampler: Sampler) -> tuple[dict, dict]:
    cost = Cost()
    seen, kept = _render_and_look(task.samples, task, scheduler, steps, guidance, sampler, cost)
    values = task.instruments.compare(seen, task.target.seen)
    values |= {check: seen[check] for check in CHECKS if check in seen}
    features = {name: seen[name] for name in (task.frechet, FID) if name in seen}
    tensors = {"images": kept}
    if task.ranked:
        more, _ = _render_and_look(task.ranked, task, scheduler, steps, guidance, sampler, cost)
        score_PS = task.of_candidates(seen[SCORE], more[SCORE])
        full_PS = task.of_candidates(task.target.seen[SCORE], task.ranked_target.seen[SCORE])
        values |= {"rank_spearman": spearman(score_PS, full_PS), "rank_top1": top1_agreement(score_PS, full_PS)}
        for check in more.keys() & set(CHECKS):
            tensors["passes"] = task.of_candidates(seen[check], more[check])
    tensors |= {f"values/{name}": value for name, value in values.items()}
    tensors |= {f"features/{name}": value for name, value in features.items()}
    return tensors, cost.summary()


def _render_and_look(
    samples: Samples, task: Task, scheduler, steps: int, guidance: float, sampler: Sampler, cost: Cost
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    instruments = task.rank_instruments if samples is task.ranked else task.instruments
    seen, kept, first = [], [], 0
    for images in sampler.render(scheduler, samples, steps, guidance, cost):
        seen.append(instruments.look(images, samples.rows(first, first + len(images)), len(images)))
        kept.append(to_8_bits(images[: max(0, KEPT_IMAGES - first)]))
        first += len(images)
    return {name: torch.cat([part[name] for part in seen]) for name in seen[0]}, torch.cat(kept)


def _network_digest(contender: Contender, sampler: Sampler) -> str | None:
    """Of a distilled network; the model itself is part of the target's key."""
    if not contender.network:
        return None
    return fingerprint(denoiser(sampler.pipe))
