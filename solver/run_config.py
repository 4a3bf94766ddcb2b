"""What `train.py` and `solver.distillation` work on: a pipeline, a solver, a dataset. Imports what it loads when it
loads it, so that a command line can be read at once."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import as_list, check_dtype, check_whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.utils.data import Dataset

    from solver.scheduling_consistency_solver import ConsistencySolverScheduler

logger = logging.getLogger(__name__)


@dataclass
class SolverRunConfig:
    """Model, data and kind of solver.

    Raises:
        ValueError: `reward_models` do not fit `rewards`, a number of rows is below 1, or there is no such `dtype`.
    """

    model: str = field(metadata={"help": "pipeline that rendered the dataset: hub id or local folder"})
    dataset: str = field(metadata={"help": "folder of a dataset, made by data.build"})
    pipeline: str | None = field(
        default=None, metadata={"help": "diffusers class; the model's own by default. Edits: FluxKontextPipeline"}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "another one, held out"})
    num_eval_rows: int = field(default=64, metadata={"help": "without eval_dataset: last rows of dataset to hold out"})
    dtype: str = field(default="float32", metadata={"help": "of the pipeline, as at the build; the VAE is float32"})
    rewards: list[str] = field(default_factory=lambda: ["depth"], metadata={"help": "short names, or dotted paths"})
    reward_models: list[str] | None = field(default=None, metadata={"help": "hub id or folder for each; or published"})

    # Solver
    initial_solver: str | None = field(default=None, metadata={"help": "a solver of the same kind to go on from"})
    solver_order: int = field(default=4, metadata={"help": "predictions that a step combines"})
    base_rule: str = field(default="dpm2m", metadata={"help": "classical rule that the untrained solver is"})
    learn_weights: bool = field(default=True, metadata={"help": "change the weights of the base rule"})
    learn_grid: bool = field(default=True, metadata={"help": "place the timesteps too"})
    head: str = field(default="gaussian", metadata={"help": "gaussian, or categorical as published"})
    num_bins: int = field(default=11, metadata={"help": "of the categorical head"})
    policy_inputs: str = field(default="noise_levels", metadata={"help": "noise_levels, or published: two timesteps"})
    timestep_spacing: str | None = field(
        default="trailing", metadata={"help": "of the base grid; null: as the pipeline"}
    )

    def __post_init__(self):
        self.rewards = as_list(self.rewards)
        models = as_list(self.reward_models) or [None] * len(self.rewards)
        self.reward_models = [None if model == "null" else model for model in models]  # "null": from the command line
        check_dtype(self.dtype)
        if len(self.reward_models) != len(self.rewards):
            raise ValueError(f"reward_models={self.reward_models}: expected one for each of {self.rewards}.")
        check_whole("num_eval_rows", self.num_eval_rows)


def load_pipeline(config: SolverRunConfig) -> "DiffusionPipeline":
    """The pipeline on the CPU, with the scheduler that it came with."""
    import torch

    from data.teacher import open_pipeline

    return open_pipeline(config.model, getattr(torch, config.dtype), config.pipeline)


def make_solver(config: SolverRunConfig, pipe: "DiffusionPipeline") -> "ConsistencySolverScheduler":
    """The solver to begin with: untrained, or `initial_solver`. Raises ValueError if that is of another kind."""
    from solver.scheduling_consistency_solver import ConsistencySolverScheduler

    kind = {
        "solver_order": config.solver_order,
        "base_rule": config.base_rule,
        "learn_weights": config.learn_weights,
        "learn_grid": config.learn_grid,
        "head": config.head,
        "num_bins": config.num_bins,
        "inputs": config.policy_inputs,
    }
    if config.initial_solver is not None:
        solver = ConsistencySolverScheduler.from_pretrained(config.initial_solver)
        if others := [
            f"{key} {solver.config[key]!r}, not {kind[key]!r}" for key in kind if solver.config[key] != kind[key]
        ]:
            raise ValueError(f"initial_solver={config.initial_solver!r} is of another kind: {'; '.join(others)}.")
        return solver
    if config.timestep_spacing is not None:
        kind["timestep_spacing"] = config.timestep_spacing
    return ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=kind.pop("solver_order"), **kind)


def load_rewards(config: SolverRunConfig) -> list:
    """The reward functions, on the CPU; a trainer moves them."""
    from rewards import load_reward

    return [load_reward(name, model) for name, model in zip(config.rewards, config.reward_models, strict=True)]


def load_datasets(config: SolverRunConfig) -> "tuple[Dataset, Dataset]":
    """Rows to train on, and rows held out. Raises ValueError if there are not enough."""
    from torch.utils.data import Subset

    from data.dataset import PreviewDataset

    dataset = PreviewDataset(config.dataset)
    if config.eval_dataset is not None:
        return dataset, PreviewDataset(config.eval_dataset)
    if len(dataset) <= config.num_eval_rows:
        raise ValueError(f"num_eval_rows={config.num_eval_rows} leaves none of the {len(dataset)} rows to train on.")
    cut = len(dataset) - config.num_eval_rows
    return Subset(dataset, range(cut)), Subset(dataset, range(cut, len(dataset)))


def find_checkpoint(checkpoint: str, output_dir: Path) -> str:
    """The folder that `resume_from_checkpoint` names; `"last"` is the latest whole one of `output_dir`.

    A run that is killed while it writes a checkpoint leaves a part of one: trainer_state.json, which comes last, is
    missing or broken.

    Raises:
        ValueError: there is no such checkpoint, or it is not whole.
    """
    if checkpoint != "last":
        if not Path(checkpoint).is_dir():
            raise ValueError(f"resume_from_checkpoint={checkpoint!r}: there is no such folder.")
        if not _is_whole(Path(checkpoint)):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is no whole checkpoint: it has no trainer_state.json that can "
                "be read. Take an earlier one; to go on from a solver alone, name it as initial_solver."
            )
        return checkpoint
    found = sorted(output_dir.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    whole = [path for path in found if _is_whole(path)]
    if not whole:
        raise ValueError(f"output_dir={str(output_dir)!r} has no checkpoint to resume from.")
    if found[-1] != whole[-1]:
        logger.warning("%s is not whole; going on from %s.", found[-1], whole[-1].name)
    return str(whole[-1])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
