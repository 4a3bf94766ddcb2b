"""AMED-Solver: steps of two evaluations, the second at a point that is chosen so that one direction is enough.

    python -m solver.amed --config configs/recipes/amed_mini_sd.yaml

A step from s_i to s_{i+1} asks the network, goes by a DDIM step to a point m between, asks again, and takes the whole
way along that second prediction, scaled:

    y_{i+1} = y_i + c (s_{i+1} - s_i) f(m)

AMED ("approximate mean direction", arXiv 2312.00094) rests on trajectories that nearly lie in a plane: there, some m
and c hit the end of the step. It learns them from the network's bottleneck features. Here they are two numbers a step,
like the tables that the public code of ConsistencySolver (arXiv 2512.13592) carries for AMED, fitted as AMED is: step
after step on the solver's own states, against the teacher's; m by search, c by least squares.

The result is a baked solver folder, a row `{name: amed, solver: runs/amed, steps: [4, 6, 8]}` of `evaluate.py`. Its
numbers of steps are network evaluations: two for each step of AMED. Flow models name their own grids, which such a
table cannot follow; `dpm2s` of `solver.multistep` is the two-evaluation solver for them.

Shape suffixes: K evaluations, C candidates, B rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.command_line import answer_help, errors_as_sentences
from data.shards import make_folder
from solver.distillation import (
    open_run,
    prediction_of,
    recorded_steps,
    state_of,
    teacher_trajectories,
    timesteps_of,
)
from solver.run_config import SolverRunConfig
from solver.scheduling_consistency_solver import ConsistencySolverScheduler, Grid, SolverTable


def amed_table(
    scheduler: ConsistencySolverScheduler, points: Grid, middle: Sequence[float], scale: Sequence[float]
) -> SolverTable:
    """The table of the first steps of a grid, as many as there are middles.

    Args:
        scheduler: of the model.
        points: the steps' ends, from noise.
        middle: of each step, the share of its way in the noise level u after which the second evaluation is made.
        scale: c of each step. Weights sum to 1 where it is 1.
    """
    u, s = points.u[: len(middle) + 1], points.s[: len(middle) + 1]
    u = u[:-1] + torch.tensor(middle, dtype=u.dtype) * u.diff()
    m = u / (1 - u)
    whole, first = s.diff(), m - s[:-1]
    weights_KM = torch.zeros(2 * len(middle), 2, dtype=s.dtype)
    weights_KM[0::2, 0] = 1
    # From m, where the first part of the way is gone already, along f at s_i.
    weights_KM[1::2, 0] = torch.tensor(scale, dtype=s.dtype) * whole / (whole - first)
    weights_KM[1::2, 1] = -first / (whole - first)
    sigmas = torch.cat([torch.stack([s[:-1], m], dim=1).flatten(), s[-1:]])
    return SolverTable(timesteps_of(scheduler, sigmas[:-1]).float(), sigmas.float(), weights_KM.float())


def fit_amed(
    renderer, rows: Sequence[dict], guidance_scale: float, evaluations: int, substeps: int, candidates: int
) -> SolverTable:
    """The table of one number of evaluations.

    Args:
        renderer: a `solver.rollout.Renderer`; its scheduler says on which grid the steps end.
        rows: of a dataset.
        guidance_scale: of the pipeline's call.
        evaluations: K, even.
        substeps: of the teacher, between two ends.
        candidates: middles that are tried, evenly spaced.

    Raises:
        ValueError: an odd number of evaluations, or a flow model.
    """
    scheduler = renderer.scheduler
    if scheduler.is_flow:
        raise ValueError("AMED's table cannot follow the grids that flow pipelines name; use the solver dpm2s.")
    if evaluations % 2 or evaluations < 2:
        raise ValueError(f"evaluations={evaluations}: AMED makes two a step, so expected an even number.")
    points = scheduler.base_grid(evaluations // 2)[1]
    targets, _ = teacher_trajectories(renderer, rows, guidance_scale, points, substeps)
    shares = [(n + 1) / (candidates + 1) for n in range(candidates)]
    middle: list[float] = []
    scale: list[float] = []
    for i in range(evaluations // 2):
        tables = [amed_table(scheduler, points, [*middle, share], [*scale, 1.0]) for share in shares]
        y_CB, f_CB = _second_evaluations(renderer, rows, guidance_scale, tables)
        way_CB = (points.s[i + 1] - points.s[i]).to(f_CB) * f_CB
        missing_CB = targets[i + 1].to(y_CB) - y_CB
        c_C = (way_CB * missing_CB).flatten(1).sum(1) / way_CB.square().flatten(1).sum(1)
        error_C = (missing_CB - c_C.reshape(-1, *[1] * (way_CB.ndim - 1)) * way_CB).square().flatten(1).sum(1)
        best = int(error_C.argmin())
        middle.append(shares[best])
        scale.append(float(c_C[best]))
    return amed_table(scheduler, points, middle, scale)


def _second_evaluations(
    renderer, rows: Sequence[dict], guidance_scale: float, tables: Sequence[SolverTable]
) -> tuple[Tensor, Tensor]:
    """y at the start of the last step, and f at its middle, `(C, B, ...)`, under each of the tables."""
    scheduler = renderer.scheduler
    found = []
    for table in tables:
        prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
        with recorded_steps(scheduler, 1) as records:
            renderer.render(prompts, seeds, guidance_scale, table)
        (start, _), (middle, output) = records[-2:]
        *_, at_start, at_middle, _ = table.sigmas
        found.append((state_of(scheduler, start, at_start), prediction_of(scheduler, middle, output, at_middle)))
    return torch.stack([y for y, _ in found]).double(), torch.stack([f for _, f in found]).double()


@dataclass
class AmedConfig(SolverRunConfig):
    """Knobs of a fit, beside model, dataset and grid."""

    output_dir: str = field(default="runs/amed", metadata={"help": "where the solver goes"})
    evaluations: list[int] = field(
        default_factory=lambda: [4, 6, 8], metadata={"help": "even numbers; one table each"}
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "one that the dataset has"})
    num_rows: int = field(default=16, metadata={"help": "rows, all in one pipeline call"})
    teacher_substeps: int = field(default=8, metadata={"help": "steps of the teacher between two ends"})
    candidates: int = field(default=7, metadata={"help": "middles tried for each step"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_rows", "teacher_substeps", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if not self.evaluations or any(count < 2 or count % 2 for count in self.evaluations):
            raise ValueError(f"evaluations={self.evaluations}: AMED makes two a step, so expected even numbers.")


def fit(config: AmedConfig) -> ConsistencySolverScheduler:
    """One run: fits, writes `output_dir`, returns the baked solver."""
    from solver.training_data import rows_by_guidance

    make_folder(Path(config.output_dir))
    renderer, dataset = open_run(config, config.num_rows)
    numbers = rows_by_guidance(dataset, [config.guidance_scale])[float(config.guidance_scale)]
    rows = [dataset[i] for i in numbers[: config.num_rows]]
    tables = {
        count: fit_amed(renderer, rows, config.guidance_scale, count, config.teacher_substeps, config.candidates)
        for count in config.evaluations
    }
    solver = bake_amed(renderer.scheduler, tables, config.guidance_scale)
    solver.save_pretrained(config.output_dir)
    return solver


def bake_amed(
    scheduler: ConsistencySolverScheduler, tables: Mapping[int, SolverTable], guidance_scale: float
) -> ConsistencySolverScheduler:
    """A solver that has these tables, by their numbers of evaluations, and nothing else."""
    baked = {
        str(count): {name: value.tolist() for name, value in table._asdict().items()} | {"actions": [[0.0]] * count}
        for count, table in tables.items()
    }
    settings = {"solver_order": 2, "learn_grid": False, "guidance_scale": guidance_scale}
    return ConsistencySolverScheduler.from_config(scheduler.config, coefficients=baked, **settings)


def main(arguments: list[str] | None = None) -> None:
    answer_help(arguments, __doc__, AmedConfig)
    from trl import TrlParser

    (config,) = TrlParser((AmedConfig,), allow_abbrev=False).parse_args_and_config(arguments)
    fit(config)
    counts = ", ".join(map(str, config.evaluations))
    print(f"{config.output_dir}: AMED's steps for {counts} evaluations, guidance {config.guidance_scale:g}.")


if __name__ == "__main__":
    with errors_as_sentences("solver.amed"):
        main()
