"""All of an evaluation, in order: full-step pictures, cells, report, pictures to look at."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.prompts import Prompts, read_prompts
from data.shards import make_folder
from data.teacher import make_scheduler
from evaluation.budget import measured_rows, needs_choice, plan
from evaluation.cells import Task, measure
from evaluation.config import Columns, EvaluationConfig
from evaluation.contact_sheet import draw_contact_sheet
from evaluation.contenders import Contender, contenders, open_network
from evaluation.instruments import Instruments
from evaluation.metrics import ClipScorer, InceptionFeatures
from evaluation.plots import draw_plots, read_trainer_state
from evaluation.rendering import NotFiniteError, Sampler, Samples, load_pipeline
from evaluation.report import Measured, Results, write_report
from evaluation.solvers import check_run, load_solver
from evaluation.targets import Targets, reference_images
from rewards import load_reward
from solver.rollout import Renderer
from solver.samplers.calls import check_edits

logger = logging.getLogger("evaluation")
RANK_SEEDS = 10_000_000  # the candidates' seeds follow this one, far from those of the prompts


@dataclass
class Bench:
    """What every measurement needs.

    Attributes:
        config: of the evaluation.
        rows: of the table.
        pipe, sampler: of the model.
        targets: its full-step pictures.
        rank_instruments: look at candidates.
        prompts: those of the table, and behind them those on which grids are chosen.
        cells: folder of the cache.
    """

    config: EvaluationConfig
    rows: list[Contender]
    pipe: DiffusionPipeline
    sampler: Sampler
    targets: Targets
    rank_instruments: Instruments
    prompts: Prompts
    cells: Path


def evaluate(config: EvaluationConfig) -> dict:
    """Measures what is missing; writes metrics.json, table.md, plots and contact sheet; returns metrics.json.

    Raises:
        OSError: `output_dir` cannot be written, or a model, a solver or a reward is missing.
        ValueError: the parts of the config do not fit together.
    """
    folder = Path(config.output_dir)
    make_folder(folder)
    trainer_state = read_trainer_state(config.trainer_state) if config.trainer_state else None
    bench = make_bench(config)
    log_budget(bench)
    results = Results(config, bench.sampler.latent_shape, _reference(bench), _grids(bench))
    with logging_redirect_tqdm():
        results.measured = [measure_columns(bench, columns) for columns in config.columns]
    logger.info("%s network evaluations were made (guidance counts once).", f"{bench.sampler.evaluations:,}")
    metrics = write_report(results, folder)
    draw_plots(metrics, trainer_state, folder)
    draw_contact_sheet(results, folder / "contact_sheet.png")
    return metrics


def make_bench(config: EvaluationConfig) -> Bench:
    """Loads everything that a config names. Raises ValueError or OSError before anything is rendered."""
    if config.reference and not config.reference.startswith("scenes:") and not Path(config.reference).is_dir():
        raise ValueError(f"reference={config.reference!r}: expected scenes:SPLIT or a folder of images.")
    pipe = load_pipeline(config.model, config.dtype, config.device, config.pipeline)
    rows = contenders(config, pipe)
    instruments, rank_instruments = load_instruments(config, pipe.device)
    chooses = any(needs_choice(columns, measured_rows(columns, rows)) for columns in config.columns)
    wanted = config.num_prompts + config.grid_prompts * chooses
    prompts = read_prompts(config.prompts, wanted, config.prompt_column, config.prompt_split, config.image_column)
    if prompts.sources:
        check_edits(pipe)
    cache = Path(config.cache_dir or Path(config.output_dir) / "cache")
    sampler = Sampler(pipe, config.height, config.width, config.batch_size, config.autocast)
    teacher = make_scheduler(config.scheduler, config.scheduler_kwargs, pipe.scheduler)
    check_run(teacher, config.num_inference_steps)
    targets = Targets(sampler, teacher, config.num_inference_steps, instruments, cache / "targets")
    return Bench(config, rows, pipe, sampler, targets, rank_instruments, prompts, cache / "cells")


def load_instruments(config: EvaluationConfig, device: torch.device) -> tuple[Instruments, Instruments]:
    """What looks at the pictures of the prompts, and at the candidates of the ranked ones."""
    pairs = zip(config.rewards, config.reward_models, strict=True)
    rewards = [load_reward(name, model=model, device=device) for name, model in pairs]
    known = {(reward.name, getattr(reward, "model", None)): reward for reward in rewards}  # not to load one twice
    checker = scorer = None
    if network := config.caption_check or config.edit_check:
        checker = known.get(("segmentation", network))
        checker = checker or load_reward("segmentation", model=network, device=device)
    if any(columns.ranked for columns in config.columns):
        scorer = ClipScorer(config.scorer, device, known.get(("clip", config.scorer)))
    inception = InceptionFeatures(device) if config.fid else None
    return Instruments(rewards, checker, scorer, inception), Instruments(checker=checker, scorer=scorer)


def log_budget(bench: Bench) -> None:
    """One line: what the evaluation costs, and how long that takes at the speed of one batch."""
    config, sampler = bench.config, bench.sampler
    count = min(config.batch_size, config.num_prompts)
    batch = make_samples(bench, range(count), range(count), config.guidance_scales[0])
    sampler.embeddings(batch.prompts)
    start = time.perf_counter()
    (images,) = sampler.render(bench.targets.scheduler, batch, 1, batch.guidance_scale)
    bench.targets.instruments.look(images, batch, count)
    others = time.perf_counter() - start - sampler.seconds
    budget = plan(config, bench.rows)
    logger.info("%s", budget.line(sampler.seconds / count, others / count))
    sampler.shared.forget()


def make_samples(bench: Bench, numbers: Sequence[int], seeds: Sequence[int], guidance_scale: float) -> Samples:
    """The prompts of these numbers, with what they edit."""
    columns = bench.prompts.texts, bench.prompts.sources, bench.prompts.edited
    texts, sources, edited = (values and tuple(values[n] for n in numbers) for values in columns)
    return Samples(texts, tuple(seeds), guidance_scale, sources, edited)


# One guidance scale


def measure_columns(bench: Bench, columns: Columns) -> Measured:
    """Every cell of some columns: the solvers number of steps by number of steps, then the rows that are set apart."""
    config, sampler = bench.config, bench.sampler
    rows = measured_rows(columns, bench.rows)
    few = grid_task(bench, columns) if needs_choice(columns, rows) else None
    task = make_task(bench, columns)
    measured = Measured(task, [])
    solvers = [row for row in rows if not row.network and not row.steps]
    for steps in columns.steps:
        sampler.shared.forget(first=1)  # the first evaluation serves all numbers of steps
        for row, grid in choose(bench, solvers, few, steps, columns, measured):
            measure_row(bench, task, row, grid, steps, sampler, measured)
    sampler.shared.forget()
    for row in rows:
        if row not in solvers and (counts := row.steps_in(columns, config)):
            with open_network(row, bench.pipe) as pipe:
                its = Sampler(pipe, config.height, config.width, config.batch_size, config.autocast)
                for steps in counts:
                    measure_row(bench, task, row, next(iter(row.grids)), steps, its, measured)
    return measured


def make_task(bench: Bench, columns: Columns) -> Task:
    """The prompts of some columns with their full-step pictures, and more candidates of the ranked ones."""
    config, numbers, guidance = bench.config, range(columns.num_prompts), columns.guidance_scale
    samples = make_samples(bench, numbers, [config.first_seed + i for i in numbers], guidance)
    task = Task(samples, bench.targets(samples), bench.targets.instruments, config.frechet)
    more = config.rank_candidates - 1
    if not columns.ranked or not more:
        return task
    seeds = [config.first_seed + RANK_SEEDS + i for i in range(columns.ranked * more)]
    candidates = make_samples(bench, [i // more for i in range(len(seeds))], seeds, guidance)
    target = bench.targets(candidates, bench.rank_instruments)
    return replace(
        task,
        ranked=candidates,
        ranked_target=target,
        rank_instruments=bench.rank_instruments,
        candidates=config.rank_candidates,
    )


def measure_row(
    bench: Bench, task: Task, row: Contender, grid: str, steps: int, sampler: Sampler, measured: Measured
) -> None:
    """Adds a cell, or says that the solver diverged."""
    metric = bench.config.main_metric
    name = f"{row.name}, guidance {task.samples.guidance_scale:g}, {steps} steps"
    try:
        cell = measure(task, row, grid, steps, sampler, bench.pipe, bench.cells)
    except NotFiniteError as error:
        logger.warning("%s: no row. %s", name, error)
        measured.left_out.append({"solver": row.name, "steps": steps, "reason": "its pictures are not finite"})
        return
    measured.cells.append(cell)
    logger.info("%s, %s grid: %s %.2f", name, grid, metric, float(cell.values[metric].mean()))


# Grids and finalists


def grid_task(bench: Bench, columns: Columns) -> Task:
    """The prompts behind those of the table, seen by the main metric alone: on them grids are chosen."""
    config = bench.config
    numbers = range(config.num_prompts, config.num_prompts + config.grid_prompts)
    samples = make_samples(bench, numbers, [config.first_seed + i for i in numbers], columns.guidance_scale)
    instruments = Instruments([bench.targets.instruments.rewards[config.main_metric]])
    return Task(samples, bench.targets(samples, instruments), instruments)


def choose(
    bench: Bench, rows: Sequence[Contender], few: Task | None, steps: int, columns: Columns, measured: Measured
) -> list[tuple[Contender, str]]:
    """Rows with their grids: every classical solver on its best one, and of these no more than the finalists."""
    if few is None:
        return [(row, next(iter(row.grids))) for row in rows]
    best: dict[str, tuple[float, str]] = {}
    for row in tqdm([row for row in rows if row.is_classical], desc=f"grids, {steps} steps", leave=False):
        tried = {grid: value for grid in row.grids if (value := _try(bench, few, row, grid, steps)) is not None}
        if tried:
            grid = max(tried, key=tried.__getitem__)
            best[row.name] = (tried[grid], grid)
            measured.grids[row.name, steps] = tried
        else:
            reason = "its pictures are not finite"
            measured.left_out.append({"solver": row.name, "steps": steps, "reason": reason})
    finalists = sorted(best, key=lambda name: best[name][0], reverse=True)[: columns.finalists]
    for name in best.keys() - set(finalists):
        measured.left_out.append({"solver": name, "steps": steps, "reason": "not a finalist"})
    others = {row.name: next(iter(row.grids)) for row in rows if not row.is_classical}
    grids = others | {name: best[name][1] for name in finalists}
    return [(row, grids[row.name]) for row in rows if row.name in grids]


def _try(bench: Bench, few: Task, row: Contender, grid: str, steps: int) -> float | None:
    """The main metric on a grid; None where the solver diverges."""
    try:
        cell = measure(few, row, grid, steps, bench.sampler, bench.pipe, bench.cells)
    except NotFiniteError:
        return None
    return float(cell.values[bench.config.main_metric].mean())


def _grids(bench: Bench) -> dict[int, dict]:
    """What the pipeline names of its grid, for each number of steps of the learned solver."""
    config = bench.config
    if not config.learned:
        return {}
    renderer = Renderer(bench.pipe, load_solver(config.learned, bench.pipe.scheduler), config.height, config.width)
    counts = {steps for columns in config.columns if columns.measures("learned") for steps in columns.steps}
    return {steps: renderer.grid(steps) for steps in sorted(counts)}


def _reference(bench: Bench) -> dict[str, torch.Tensor] | None:
    """What the instruments of the Fréchet distances see in the reference pictures; None: the full-step pictures."""
    config, instruments = bench.config, bench.targets.instruments
    if config.reference is None:
        return None
    rewards = [instruments.rewards[config.frechet]] if config.frechet else []
    looking = Instruments(rewards, inception=instruments.inception)
    size = (bench.sampler.height, bench.sampler.width)
    images = torch.cat(list(reference_images(config.reference, config.num_prompts, size)))
    return looking.look(images, Samples(("",) * len(images), (0,) * len(images), 0), config.batch_size)
