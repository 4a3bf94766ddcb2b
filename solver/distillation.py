"""The same solver, fitted to the teacher's trajectories instead of trained by reward.

    python -m solver.distillation --config configs/recipes/distilled_mini_sd.yaml

Where the teacher passes the points of a K-step grid, the weights that best lead from each point to the next solve a
linear least-squares problem. With y the state, f the predictions along the teacher's own path, b_j the base rule,

    minimise over a   ‖ (y_{i+1} - y_i) / (s_{i+1} - s_i) - Σ_j (b_j + r_j(a)) f_{i+1-j} ‖²,     Σ_j r_j(a) = 0

r(a) adds a_d to the d-th weight and takes Σ a from the oldest, so the constraint Σ w = 1 is built in, and the problem
is one in the differences f_{i+1-d} - f_oldest. Its smallest solution stays at the base rule where the data does not
decide. The policy is then fitted to these actions; the grid stays the base grid, since no such problem tells it.

It is the papers' "Ours-Distill" in spirit (no code of theirs exists), a baseline, and a start for PPO
(`initial_solver`). It sees the teacher's states, never its own: errors add up that it did not learn to mend.

Shape suffixes: K steps, M history (newest first), A weight actions (M - 1), B rows, N values of a row.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from data.command_line import answer_help, errors_as_sentences
from data.shards import make_folder
from solver.run_config import SolverRunConfig
from solver.scheduling_consistency_solver import ConsistencySolverScheduler, Grid, SolverTable, dpm2m

logger = logging.get_logger(__name__)

RANK_TOLERANCE = 1e-9  # of the Gram matrix: directions of less weight are left to the base rule


# ---------------------------------------------------------------------------------------------------------------------
# Least squares
# ---------------------------------------------------------------------------------------------------------------------


class WeightFit:
    """Least squares over batches: keeps the Gram matrices, a few numbers a step.

    Args:
        base_weights_KM: the rule that zero actions stand for.
        s: the K+1 grid points, σ/α or σ.
    """

    def __init__(self, base_weights_KM: Tensor, s: Tensor):
        self.base_weights_KM, self.s = base_weights_KM.double(), s.double()
        steps, order = base_weights_KM.shape
        self.gram_KAA = torch.zeros(steps, order - 1, order - 1, dtype=torch.float64)
        self.moment_KA = torch.zeros(steps, order - 1, dtype=torch.float64)

    def add(self, states: Tensor, predictions: Tensor) -> None:
        """Adds trajectories.

        Args:
            states: y at the grid points, `(K+1, ...)`.
            predictions: f at all but the last, `(K, ...)`.
        """
        y, f = states.double().flatten(1), predictions.double().flatten(1)
        slope_KN = y.diff(dim=0) / self.s.diff()[:, None].to(y)
        for i, base_M in enumerate(self.base_weights_KM.to(y)):
            history = min(i + 1, len(base_M))
            past_hN = torch.stack([f[i - j] for j in range(history)])
            residual_N = slope_KN[i] - base_M[:history] @ past_hN
            directions = past_hN[:-1] - past_hN[-1]
            self.gram_KAA[i, : history - 1, : history - 1] += (directions @ directions.T).cpu()
            self.moment_KA[i, : history - 1] += (directions @ residual_N).cpu()

    def actions(self) -> Tensor:
        """The weight residuals `(K, A)`; 0 where there is no history, and along what no trajectory decides."""
        inverse = torch.linalg.pinv(self.gram_KAA, rtol=RANK_TOLERANCE, hermitian=True)
        return (inverse @ self.moment_KA[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Teacher
# ---------------------------------------------------------------------------------------------------------------------


def dense_table(scheduler: ConsistencySolverScheduler, points: Grid, substeps: int) -> SolverTable:
    """A second-order table that passes every point of a grid, with `substeps` steps between two of them."""
    part = torch.arange(substeps) / substeps
    u = torch.cat([(points.u[:-1, None] + part * points.u.diff()[:, None]).flatten(), points.u[-1:]])
    dense = Grid.flow(u) if scheduler.is_flow else Grid.variance_preserving(u / (1 - u))
    return SolverTable(timesteps_of(scheduler, dense.s[:-1]).float(), dense.s.float(), dpm2m(dense, 2).float())


def timesteps_of(scheduler: ConsistencySolverScheduler, s: Tensor) -> Tensor:
    """What the network is told at grid points s."""
    return s * len(scheduler) if scheduler.is_flow else scheduler._timestep_of(s)


def state_of(scheduler: ConsistencySolverScheduler, x: Tensor, s: Tensor) -> Tensor:
    """y of a sample at the grid point s, which broadcasts."""
    return x if scheduler.is_flow else x * torch.sqrt(1 + s**2)


def prediction_of(scheduler: ConsistencySolverScheduler, x: Tensor, output: Tensor, s: Tensor) -> Tensor:
    """f of what the network predicts for a sample at s."""
    if scheduler.config.prediction_type != "v_prediction":
        return output
    alpha = torch.rsqrt(1 + s**2)
    return alpha * output + s * alpha * x


@contextmanager
def recorded_steps(scheduler: ConsistencySolverScheduler, every: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, (sample, model_output) of every `every`-th step of the scheduler, in float32."""
    records: list[tuple[Tensor, Tensor]] = []
    original = scheduler.step

    @functools.wraps(original)  # pipelines look at its signature
    def step(model_output, timestep, sample, return_dict=True):
        if (scheduler.step_index or 0) % every == 0:
            records.append((sample.float(), model_output.float()))
        return original(model_output, timestep, sample, return_dict)

    scheduler.step = step
    try:
        yield records
    finally:
        del scheduler.step


def teacher_trajectories(renderer, rows: Sequence[dict], guidance_scale: float, points: Grid, substeps: int):
    """The teacher's states y, `(K+1, B, ...)`, and predictions f, `(K, B, ...)`, at the points of a grid.

    Args:
        renderer: a `solver.rollout.Renderer`.
        rows: of a dataset; as many as `renderer.batch_size` at most.
        guidance_scale: of the pipeline's call.
        points: the grid of the few-step solver.
        substeps: of the teacher, between two points.
    """
    from solver.samplers.latents import pack

    scheduler = renderer.scheduler
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    with recorded_steps(scheduler, substeps) as records:
        sources = [row["source"] for row in rows] if "source" in rows[0] else None
        previews = renderer.render(prompts, seeds, guidance_scale, dense_table(scheduler, points, substeps), sources)
    samples = [*(sample for sample, _ in records), pack(renderer.pipe, previews.latents_BCHW).float()]
    x, outputs = torch.stack(samples), torch.stack([output for _, output in records])
    s = points.s.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return state_of(scheduler, x, s), prediction_of(scheduler, x[:-1], outputs, s[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------------------------------

Cells = Mapping[tuple[int, float], Tensor]


def fit_actions(renderer, dataset, step_counts: Sequence[int], num_rows: int, substeps: int) -> Cells:
    """The best actions `(K, D)` of every cell (K, guidance scale of the dataset).

    Args:
        renderer: a `solver.rollout.Renderer`; its scheduler says order, base rule and grid.
        dataset: rows as in `data.dataset.PreviewDataset`.
        step_counts: the numbers of steps K.
        num_rows: rows a guidance scale, at most.
        substeps: of the teacher, between two points of the grid.
    """
    from solver.training_data import rows_by_guidance

    scheduler, cells = renderer.scheduler, {}
    for guidance_scale, numbers in rows_by_guidance(dataset).items():
        rows = [dataset[i] for i in numbers[:num_rows]]
        for steps in step_counts:
            grid = renderer.grid(steps, rows[0]["prompt"])
            zero = torch.zeros(steps, scheduler.num_actions)
            base = scheduler.table_from_actions(zero, steps, **grid).weights
            points = scheduler.base_grid(steps, **grid)[1]
            fit = WeightFit(base, points.s)
            for start in range(0, len(rows), renderer.batch_size):
                batch = rows[start : start + renderer.batch_size]
                fit.add(*teacher_trajectories(renderer, batch, guidance_scale, points, substeps))
            cells[steps, guidance_scale] = _within_ranges(scheduler, fit.actions())
    return cells


def _within_ranges(scheduler: ConsistencySolverScheduler, actions_KA: Tensor) -> Tensor:
    """Actions (K, D) that the policy can give; the grid's are 0."""
    actions = F.pad(actions_KA, (0, scheduler.num_actions - actions_KA.shape[-1])).float()
    low, high = torch.tensor(scheduler.action_ranges()).T
    margin = 0.01 * (high - low)  # of a bounded head: it reaches its ends nowhere
    return actions.clamp(low + margin, high - margin)


def fit_policy(
    scheduler: ConsistencySolverScheduler,
    cells: Cells,
    updates: int = 2000,
    learning_rate: float = 1e-3,
    grids: Mapping[int, dict] | None = None,
) -> float:
    """Fits the policy's deterministic actions to those of all cells, by Adam with a cosine to 0.

    Args:
        scheduler: its policy is trained in place.
        cells: (K, guidance scale) -> actions (K, D).
        updates: of Adam, each on all cells.
        learning_rate: its first one.
        grids: K -> arguments of `base_grid`, for flow pipelines that name their own grid.

    Returns:
        the root mean square error over the live actions.
    """
    policy = scheduler.policy
    device = next(policy.parameters()).device
    inputs = [scheduler.policy_inputs(steps, scale, **(grids or {}).get(steps, {})) for steps, scale in cells]
    live = torch.cat([scheduler.action_mask(steps) for steps, _ in cells]).to(device)
    inputs, targets = torch.cat(inputs).to(device), torch.cat(list(cells.values())).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        loss = (policy.deterministic_actions(inputs) - targets)[live].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (policy.deterministic_actions(inputs) - targets)[live].square().mean().sqrt().item()


@dataclass
class DistillationConfig(SolverRunConfig):
    """Knobs of a distillation, beside model, dataset and solver."""

    output_dir: str = field(default="runs/distilled", metadata={"help": "where the solver goes"})
    min_inference_steps: int = field(default=2, metadata={"help": "the lowest number of steps"})
    max_inference_steps: int = field(default=15, metadata={"help": "the highest"})
    num_rows: int = field(default=64, metadata={"help": "rows a guidance scale"})
    teacher_substeps: int = field(default=8, metadata={"help": "steps of the teacher between two of the solver"})
    batch_size: int = field(default=64, metadata={"help": "rows of a pipeline call"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("min_inference_steps", "num_rows", "teacher_substeps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.max_inference_steps < self.min_inference_steps:
            raise ValueError(
                f"max_inference_steps={self.max_inference_steps} is below "
                f"min_inference_steps={self.min_inference_steps}."
            )
        if self.solver_order < 2 or not self.learn_weights:
            raise ValueError(
                f"solver_order={self.solver_order}, learn_weights={self.learn_weights}: the weights alone are fitted, "
                "and a single one is always 1."
            )


def open_run(config: SolverRunConfig, batch_size: int):
    """The renderer and the dataset that a config names."""
    from solver.rollout import Renderer
    from solver.run_config import load_datasets, load_pipeline, make_solver
    from solver.training_data import check_teacher, image_size

    pipe = load_pipeline(config)
    dataset, _ = load_datasets(config)
    check_teacher(dataset, pipe)
    scheduler = make_solver(config, pipe)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return Renderer(pipe, scheduler, *image_size(dataset), batch_size), dataset


def distill(config: DistillationConfig) -> ConsistencySolverScheduler:
    """One run: fits, writes `output_dir`, returns the solver."""
    make_folder(Path(config.output_dir))
    renderer, dataset = open_run(config, config.batch_size)
    scheduler = renderer.scheduler
    step_counts = range(config.min_inference_steps, config.max_inference_steps + 1)
    cells = fit_actions(renderer, dataset, step_counts, config.num_rows, config.teacher_substeps)
    error = fit_policy(scheduler, cells, grids={steps: renderer.grid(steps) for steps in step_counts})
    scheduler.extend_training(step_counts, {scale for _, scale in cells})
    scheduler.register_to_config(trained_model=config.model)
    scheduler.save_pretrained(config.output_dir)
    logger.warning(f"{len(cells)} cells; the policy meets their weights to {error:.3f} (rms).")
    return scheduler


def main(arguments: list[str] | None = None) -> None:
    answer_help(arguments, __doc__, DistillationConfig)
    from trl import TrlParser

    (config,) = TrlParser((DistillationConfig,), allow_abbrev=False).parse_args_and_config(arguments)
    distill(config)
    print(f"{config.output_dir}: a solver whose weights follow the teacher's trajectories.")


if __name__ == "__main__":
    with errors_as_sentences("solver.distillation"):
        main()
