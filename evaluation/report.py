"""metrics.json: all numbers of an evaluation.

It has `model`, `dataset`, `rows` and `paired` (below), and beside them: `metrics` (unit, direction, whether
it was trained on), `across_steps` (the learned solver at K steps against the best classical one at the next K),
`from_full` (its checks against those of the full-step pictures), `workflow`, `coefficients` of the learned solver, and
what it ran on.

    rows    {"solver", "steps", "guidance_scale", "nfe", "prompts", "metrics": {name: {"mean", "ci95"}},
             "seconds_per_image", "solver_share", "grid", "grids", "own_guidance_scale"}
            `grids` has the main metric of every grid on the prompts on which it was chosen; these are not the table's
    paired  {"a", "b", "steps", "guidance_scale", "metric", "difference", "ci95"}, the difference being a - b, on the
            prompts that both have
    left_out  {"solver", "steps", "guidance_scale", "reason"}
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.shards import write_json, write_whole
from data.teacher import library_versions
from evaluation.bootstrap import Estimate, mean
from evaluation.cells import Cell, Task
from evaluation.config import EvaluationConfig
from evaluation.instruments import CAPTION_CHECK, CHECKS, EDIT_CHECK, FID
from evaluation.metrics import frechet
from evaluation.table import table
from evaluation.workflow import simulate
from solver import ConsistencySolverScheduler
from solver.samplers.digest import solver_digest

UNITS = {"pixels": "PSNR, dB", "depth": "PSNR of depth, dB", "ssim": "SSIM, %", "segmentation": "% of pixels"}
COSINE = "(cos + 1) · 50"
OTHER_UNITS = {
    CAPTION_CHECK: "share of pictures",
    EDIT_CHECK: "share of pictures",
    "rank_spearman": "rank correlation",
    "rank_top1": "share of prompts",
    FID: "FID",
}
LOWER_IS_BETTER = ("frechet_", FID)
FULL = "full"


@dataclass
class Measured:
    """All cells of some columns.

    Attributes:
        task: what they were measured on.
        cells: of the table.
        grids: (solver, steps) -> grid -> main metric on the prompts on which grids are chosen.
        left_out: solvers that have no cell, `{"solver", "steps", "reason"}`.
    """

    task: Task
    cells: list[Cell]
    grids: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    left_out: list[dict] = field(default_factory=list)


@dataclass
class Results:
    """All that was measured.

    Attributes:
        config: of the evaluation.
        latent_shape: of a picture.
        reference: features of reference pictures by name; None where they are the full-step pictures.
        grids: number of steps of the learned solver -> what the pipeline names of its grid, as of `base_grid`.
        measured: one entry for each columns of the config.
    """

    config: EvaluationConfig
    latent_shape: tuple[int, ...]
    reference: dict[str, torch.Tensor] | None
    grids: Mapping[int, dict] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)


def write_report(results: Results, folder: Path) -> dict:
    """Writes metrics.json and table.md into a folder; returns the content of the first."""
    metrics = make_metrics(results)
    write_json(folder / "metrics.json", metrics)
    write_whole(folder / "table.md", table(metrics).encode())
    return metrics


def make_metrics(results: Results) -> dict:
    """The content of metrics.json."""
    config = results.config
    rows, differences, across, from_full, workflow, left_out = [], [], [], [], [], []
    classical = set(config.solvers) - {"base"}
    for guidance in config.guidance_scales:
        here = [measured for measured in results.measured if measured.task.samples.guidance_scale == guidance]
        most = max(here, key=lambda measured: len(measured.task.samples.prompts))
        rows.append(full_row(most.task, results))
        cells = sorted(((cell, m) for m in here for cell in m.cells), key=lambda pair: pair[0].steps)
        both = [(cell, estimate(cell, m.task, results)) for cell, m in cells]
        rows += [make_row(cell, e, m) for (_, e), (cell, m) in zip(both, cells, strict=True)]
        differences += paired_differences(both, config.resamples)
        across += differences_across_steps(both, classical, config.resamples)
        from_full += differences_from_full([cell for cell, _ in cells], most.task, config.resamples)
        workflow += [w for cell, m in cells if (w := simulate_cell(cell, m.task, results))]
        left_out += [{**entry, "guidance_scale": guidance} for m in here for entry in m.left_out]
    found = {name for row in rows for name in row["metrics"]}
    order = [*config.rewards, f"frechet_{config.frechet}", FID, *CHECKS, "rank_spearman", "rank_top1"]
    names = [name for name in order if name in found]
    return {
        "model": config.model,
        "pipeline": config.pipeline,
        "dataset": {
            "prompts": config.prompts,
            "first_seed": config.first_seed,
            "grid_prompts": config.grid_prompts,
        },
        "rows": rows,
        "paired": differences,
        "across_steps": across,
        "from_full": from_full,
        "workflow": workflow,
        "left_out": left_out,
        "metrics": {name: describe_metric(name, config) for name in names},
        "main_metric": config.main_metric,
        "full_steps": {"scheduler": config.scheduler, "steps": config.num_inference_steps, **config.scheduler_kwargs},
        "reference": config.reference or "full-step pictures",
        "learned": config.learned,
        "learned_digest": config.learned and solver_digest(ConsistencySolverScheduler.from_pretrained(config.learned)),
        "coefficients": coefficients(config, results.grids) if config.learned else [],
        "latent_shape": list(results.latent_shape),
        "hardware": hardware(),
        "dtype": config.dtype,
        "autocast": config.autocast,
        "batch_size": config.batch_size,
        "versions": library_versions(),
    }


# Estimates


def estimate(cell: Cell, task: Task, results: Results) -> dict[str, Estimate]:
    """Every metric of a cell with its bootstrap."""
    estimates = {name: mean(values, results.config.resamples) for name, values in cell.values.items()}
    target = task.target.seen if results.reference is None else results.reference
    for name, features in cell.features.items():
        key = FID if name == FID else f"frechet_{name}"
        estimates[key] = frechet(features, target[name], paired=results.reference is None)
    return estimates


def make_row(cell: Cell, estimates: Mapping[str, Estimate], measured: Measured) -> dict:
    return {
        "solver": cell.solver,
        "steps": cell.steps,
        "guidance_scale": cell.guidance_scale,
        "nfe": cell.facts["nfe"],
        "prompts": len(measured.task.samples.prompts),
        "metrics": {name: {"mean": e.value, "ci95": e.ci95} for name, e in estimates.items()},
        "seconds_per_image": cell.facts["seconds_per_image"],
        "solver_share": cell.facts["solver_share"],
        "grid": cell.grid,
        "grids": measured.grids.get((cell.solver, cell.steps), {}),
        "own_guidance_scale": cell.facts["own_guidance_scale"],
    }


def full_row(task: Task, results: Results) -> dict:
    """The full-step pictures themselves: what they cost, and what needs no comparison."""
    seen, config = task.target.seen, results.config
    estimates = {check: mean(seen[check], config.resamples) for check in CHECKS if check in seen}
    if results.reference is not None:
        for name in (config.frechet, FID):
            if name in seen and name in results.reference:
                key = FID if name == FID else f"frechet_{name}"
                estimates[key] = frechet(seen[name], results.reference[name], paired=False)
    facts = {**task.target.cost, "own_guidance_scale": task.samples.guidance_scale}
    grid = config.scheduler_kwargs.get("timestep_spacing", "own")
    steps, guidance = config.num_inference_steps, task.samples.guidance_scale
    cell = Cell(FULL, grid, steps, guidance, facts, {}, {}, None, task.target.images[:0])
    return make_row(cell, estimates, Measured(task, []))


Both = Sequence[tuple[Cell, Mapping[str, Estimate]]]


def paired_differences(cells: Both, resamples: int, a: str = "learned") -> list[dict]:
    """The learned solver minus each other one, at the same number of steps."""
    mine = {cell.steps: (cell, estimates) for cell, estimates in cells if cell.solver == a}
    entries = []
    for other in cells:
        cell, estimates = other
        if cell.solver != a and cell.steps in mine:
            for name in estimates:
                if difference := paired(mine[cell.steps], other, name, resamples):
                    entries.append(_difference(a, cell.solver, cell, name, difference, {"steps": cell.steps}))
    return entries


def differences_across_steps(cells: Both, classical: set[str], resamples: int, a: str = "learned") -> list[dict]:
    """The learned solver at K steps minus the best classical one at the next greater K that has any."""
    counts = sorted({cell.steps for cell, _ in cells if cell.solver in classical})
    entries = []
    for mine in cells:
        cell, estimates = mine
        more = next((steps for steps in counts if steps > cell.steps), None)
        if cell.solver != a or more is None:
            continue
        for name in estimates:
            sign = -1 if name.startswith(LOWER_IS_BETTER) else 1
            others = [pair for pair in cells if pair[0].steps == more and pair[0].solver in classical]
            best = max(
                (pair for pair in others if name in pair[1]), key=lambda pair: sign * pair[1][name].value, default=None
            )
            if best and (difference := paired(mine, best, name, resamples)):
                steps = {"steps": cell.steps, "steps_b": more}
                entries.append(_difference(a, best[0].solver, cell, name, difference, steps))
    return entries


def differences_from_full(cells: Sequence[Cell], task: Task, resamples: int, a: str = "learned") -> list[dict]:
    """The learned solver minus the full-step pictures, in the checks: all else compares with these."""
    entries = []
    for cell in cells:
        for check in task.target.seen.keys() & set(CHECKS) if cell.solver == a else ():
            mine = cell.values[check].double()
            difference = mean(mine - task.target.seen[check][: len(mine)].double(), resamples)
            entries.append(_difference(a, FULL, cell, check, difference, {"steps": cell.steps}))
    return entries


def paired(
    a: tuple[Cell, Mapping[str, Estimate]], b: tuple[Cell, Mapping[str, Estimate]], name: str, resamples: int
) -> Estimate | None:
    """a - b in a metric that b has. Cells of different columns begin with the same prompts, and pair on those.

    None where a has no such metric, or where it is one of whole sets (a Fréchet distance) and these differ.
    """
    (cell_a, of_a), (cell_b, of_b) = a, b
    if name not in of_a:
        return None
    if of_a[name].count == of_b[name].count:
        return of_a[name] - of_b[name]
    if name not in cell_a.values:
        return None
    both = min(of_a[name].count, of_b[name].count)
    return mean(cell_a.values[name][:both].double() - cell_b.values[name][:both].double(), resamples)


def _difference(a: str, b: str, cell: Cell, metric: str, difference: Estimate, steps: dict) -> dict:
    return {
        "a": a,
        "b": b,
        **steps,
        "guidance_scale": cell.guidance_scale,
        "metric": metric,
        "difference": difference.value,
        "ci95": difference.ci95,
    }


def simulate_cell(cell: Cell, task: Task, results: Results) -> dict | None:
    """The preview-and-refine workflow with a cell's previews; None where there are no candidates."""
    if cell.passes is None:
        return None
    (check,) = task.target.seen.keys() & set(CHECKS)
    full = task.of_candidates(task.target.seen[check], task.ranked_target.seen[check]).bool()
    which = {"solver": cell.solver, "steps": cell.steps, "guidance_scale": cell.guidance_scale}
    nfe, seconds = (
        simulate(cell.passes, full, cell.facts[key], task.target.cost[key], results.config.resamples)
        for key in ("nfe", "seconds_per_image")
    )
    costs = {}
    for name in ("full_only", "preview_first", "saving"):
        costs |= {f"{name}_nfe": nfe.pop(name), f"{name}_seconds": seconds[name]}
    return {**which, "prompts": len(full), "seeds": full.shape[1], **costs, **nfe}


# Descriptions


def describe_metric(name: str, config: EvaluationConfig) -> dict:
    lower = name.startswith(LOWER_IS_BETTER)
    unit = OTHER_UNITS.get(name) or ("squared distance" if lower else UNITS.get(name, COSINE))
    return {"unit": unit, "higher_is_better": not lower, "trained_on": name in config.trained_on}


def coefficients(config: EvaluationConfig, grids: Mapping[int, dict]) -> list[dict]:
    """The learned table and that of its base rule on its base grid, for every number of steps and guidance scale."""
    solver = ConsistencySolverScheduler.from_pretrained(config.learned)
    base = ConsistencySolverScheduler.from_config(solver.config, coefficients=None)

    def table(scheduler: ConsistencySolverScheduler, steps: int, guidance: float) -> dict:
        found = scheduler.coefficients(steps, guidance, **grids.get(steps, {}))
        return {name: value.tolist() for name, value in found._asdict().items()}

    return [
        {
            "steps": steps,
            "guidance_scale": guidance,
            "learned": table(solver, steps, guidance),
            "base": table(base, steps, guidance),
        }
        for guidance, steps in sorted(
            {(c.guidance_scale, k) for c in config.columns if c.measures("learned") for k in c.steps}
        )
    ]


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} processor, torch threads: {torch.get_num_threads()}"
