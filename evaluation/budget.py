"""What an evaluation costs, before it begins.

An evaluation of the network is one of one picture, guidance included. The plan knows which are shared (see
`rendering`), but not what the cache has, and takes it that all classical solvers end up on the same grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.config import Columns, EvaluationConfig
from evaluation.contenders import Contender


@dataclass
class Budget:
    """Attributes:
    full_steps: evaluations for full-step pictures.
    grids: evaluations for the choice of grids and finalists.
    rows: evaluations for the rows of the table.
    pictures: all that are decoded and looked at.
    """

    full_steps: int = 0
    grids: int = 0
    rows: int = 0
    pictures: int = 0

    @property
    def evaluations(self) -> int:
        return self.full_steps + self.grids + self.rows

    def line(self, seconds_per_evaluation: float, seconds_per_picture: float) -> str:
        """The budget in a sentence, with the time it takes at this speed."""
        minutes = (self.evaluations * seconds_per_evaluation + self.pictures * seconds_per_picture) / 60
        return (
            f"Budget: {self.evaluations:,} network evaluations ({self.full_steps:,} for full-step pictures, "
            f"{self.grids:,} to choose grids, {self.rows:,} for the rows; guidance counts once) and "
            f"{self.pictures:,} pictures. At "
            f"{1 / seconds_per_evaluation:.0f} evaluations and {1 / seconds_per_picture:.0f} pictures a second: "
            f"{minutes:.0f} minutes, less what is in the cache."
        )


def plan(config: EvaluationConfig, rows: Sequence[Contender]) -> Budget:
    """The cost of a config from an empty cache."""
    budget = Budget()
    for guidance in config.guidance_scales:
        here = [columns for columns in config.columns if columns.guidance_scale == guidance]
        chooses = any(needs_choice(columns, measured_rows(columns, rows)) for columns in here)
        more = max(columns.ranked for columns in here) * (config.rank_candidates - 1)
        pictures = max(columns.num_prompts for columns in here) + more + config.grid_prompts * chooses
        budget.full_steps += pictures * config.num_inference_steps
        budget.pictures += pictures
        for columns in here:
            _plan_columns(config, columns, measured_rows(columns, rows), budget)
    return budget


def _plan_columns(config: EvaluationConfig, columns: Columns, rows: Sequence[Contender], budget: Budget) -> None:
    pictures = columns.num_prompts + columns.ranked * (config.rank_candidates - 1)
    classical = [row for row in rows if row.is_classical]
    chooses = needs_choice(columns, rows)
    for steps in columns.steps:
        on_grid: set[str] = set()
        for row in classical if chooses else ():
            for grid in row.grids:
                shared = 2 if grid in on_grid else 0 if grid == "leading" else 1
                on_grid.add(grid)
                budget.grids += config.grid_prompts * max(steps - shared, 0)
                budget.pictures += config.grid_prompts
        measured = len(classical[: columns.finalists])
        budget.rows += pictures * (max(steps - 2, 0) * measured + bool(measured))
        budget.pictures += pictures * measured
        for row in rows:
            if not row.is_classical and not row.steps:
                budget.rows += pictures * (steps if row.network else steps - 1)
                budget.pictures += pictures
    for row in rows:
        if row.steps:
            its = row.steps_in(columns, config)
            budget.rows += pictures * sum(its)
            budget.pictures += pictures * len(its)


def measured_rows(columns: Columns, rows: Sequence[Contender]) -> list[Contender]:
    """The rows that some columns have."""
    return [row for row in rows if columns.measures(row.name)]


def needs_choice(columns: Columns, rows: Sequence[Contender]) -> bool:
    """Whether solvers are tried on other prompts first: on several grids, or for a place among the finalists."""
    classical = [row for row in rows if row.is_classical]
    eliminates = columns.finalists is not None and columns.finalists < len(classical)
    return eliminates or any(len(row.grids) > 1 for row in classical)
