"""All of an evaluation, in order: full-step pictures, cells, report, pictures to look at."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.latents import default_size
from data.prompts import read_prompts
from data.shards import make_folder
from data.teacher import make_scheduler
from evaluation.bootstrap import mean
from evaluation.cells import Cell, Task, best_grids, measure
from evaluation.config import EvaluationConfig
from evaluation.contact_sheet import draw_contact_sheet
from evaluation.contenders import Contender, contenders, open_network
from evaluation.instruments import Instruments
from evaluation.metrics import ClipScorer, InceptionFeatures
from evaluation.plots import draw_plots
from evaluation.rendering import Sampler, load_pipeline
from evaluation.report import Measured, Results, write_report
from evaluation.targets import Samples, Targets, reference_images
from rewards import load_reward

logger = logging.getLogger("evaluation")
RANK_SEEDS = 10_000_000  # the candidates' seeds follow this one, far from those of the prompts


def evaluate(config: EvaluationConfig) -> dict:
    """Measures what is missing; writes metrics.json, table.md, plots and contact sheet; returns metrics.json.

    Raises:
        OSError: `output_dir` cannot be written, or a model, a solver or a reward is missing.
        ValueError: the parts of the config do not fit together.
    """
    folder = Path(config.output_dir)
    make_folder(folder)
    pipe = load_pipeline(config.model, config.dtype, config.device)
    rows = contenders(config, pipe)
    instruments, rank_instruments = load_instruments(config, pipe.device)
    prompts = read_prompts(config.prompts, max(config.num_prompts), config.prompt_column, config.prompt_split).texts
    cache = Path(config.cache_dir or folder / "cache")
    sampler = Sampler(pipe, config.height, config.width, config.batch_size, config.autocast)
    teacher = make_scheduler(config.scheduler, config.scheduler_kwargs, pipe.scheduler)
    targets = Targets(sampler, teacher, config.num_inference_steps, instruments, cache / "targets")

    results = Results(config, sampler.latent_shape, _reference(config, pipe, instruments))
    with logging_redirect_tqdm():
        for guidance, count, ranked in zip(
            config.guidance_scale, config.num_prompts, config.rank_prompts, strict=True
        ):
            task = make_task(config, targets, rank_instruments, prompts[:count], prompts[:ranked], guidance)
            measured = [
                cell for row in rows for cell in measure_row(config, row, task, pipe, sampler, cache / "cells")
            ]
            results.measured.append(Measured(task, measured))
    metrics = write_report(results, folder)
    draw_plots(metrics, config, folder)
    draw_contact_sheet(results, folder / "contact_sheet.png")
    return metrics


def load_instruments(config: EvaluationConfig, device: torch.device) -> tuple[Instruments, Instruments]:
    """What looks at the pictures of the prompts, and at the candidates of the ranked ones."""
    pairs = zip(config.rewards, config.reward_models, strict=True)
    rewards = [load_reward(name, model=model, device=device) for name, model in pairs]
    checker = None
    if config.caption_check:
        same = [reward for reward in rewards if getattr(reward, "model", None) == config.caption_check]
        checker = same[0] if same else load_reward("segmentation", model=config.caption_check, device=device)
    scorer = ClipScorer(config.scorer, device) if any(config.rank_prompts) else None
    inception = InceptionFeatures(device) if config.fid else None
    return Instruments(rewards, checker, inception=inception), Instruments(checker=checker, scorer=scorer)


def make_task(
    config: EvaluationConfig,
    targets: Targets,
    rank_instruments: Instruments,
    prompts: Sequence[str],
    ranked: Sequence[str],
    guidance: float,
) -> Task:
    """The prompts of a guidance scale with their full-step pictures, and the candidates of the ranked ones."""
    samples = Samples(tuple(prompts), tuple(config.first_seed + i for i in range(len(prompts))), guidance)
    task = Task(samples, targets(samples), targets.instruments, config.frechet)
    if not ranked:
        return task
    each = config.rank_candidates
    candidates = Samples(
        tuple(prompt for prompt in ranked for _ in range(each)),
        tuple(config.first_seed + RANK_SEEDS + i for i in range(len(ranked) * each)),
        guidance,
    )
    return Task(
        *(samples, task.target, task.instruments, config.frechet),
        *(candidates, targets(candidates, rank_instruments), rank_instruments, each),
    )


def measure_row(
    config: EvaluationConfig, row: Contender, task: Task, pipe: DiffusionPipeline, sampler: Sampler, folder: Path
) -> list[Cell]:
    """The cells of a contender at one guidance scale, each on its best grid by the main metric."""
    cells = []
    with open_network(row, pipe) as opened:
        if row.network:
            sampler = Sampler(opened, config.height, config.width, config.batch_size, config.autocast)
        choose = len(row.grids) > 1 and config.grid_prompts < len(task.samples.prompts)
        few = _main_metric_only(task, config) if choose else None
        name = f"{row.name}, guidance {task.samples.guidance_scale:g}"
        for steps in tqdm(row.steps or config.steps, desc=name, leave=False):
            grids = list(row.grids)
            tried: dict[str, float] = {}
            if few:
                screened = [measure(few, row, grid, steps, sampler, pipe, folder) for grid in grids]
                tried = {cell.grid: float(cell.values[config.main_metric].mean()) for cell in screened}
                grids = best_grids(screened, config.main_metric, config.resamples)
            full = [measure(task, row, grid, steps, sampler, pipe, folder) for grid in grids]
            tried |= {cell.grid: float(cell.values[config.main_metric].mean()) for cell in full}
            best = max(full, key=lambda cell: tried[cell.grid])
            best.facts["grids"] = tried
            cells.append(best)
            value = mean(best.values[config.main_metric], config.resamples)
            logger.info("%s, %d steps, %s grid: %s %.2f", name, steps, best.grid, config.main_metric, value.value)
    return cells


def _main_metric_only(task: Task, config: EvaluationConfig) -> Task:
    """The first prompts, seen by the main metric alone: enough to rule out most grids."""
    reward = task.instruments.rewards[config.main_metric]
    few = slice(config.grid_prompts)
    samples = Samples(task.samples.prompts[few], task.samples.seeds[few], task.samples.guidance_scale)
    target = task.target._replace(seen={reward.name: task.target.seen[reward.name][few]})
    return Task(samples, target, Instruments([reward]))


def _reference(
    config: EvaluationConfig, pipe: DiffusionPipeline, instruments: Instruments
) -> dict[str, torch.Tensor] | None:
    """What the instruments of the Fréchet distances see in the reference pictures; None: the full-step pictures."""
    if config.reference is None:
        return None
    rewards = [instruments.rewards[config.frechet]] if config.frechet else []
    looking = Instruments(rewards, inception=instruments.inception)
    height, width = default_size(pipe)
    size = (config.height or height, config.width or width)
    images = torch.cat(list(reference_images(config.reference, max(config.num_prompts), size)))
    return looking.look(images, [""] * len(images), config.batch_size)
