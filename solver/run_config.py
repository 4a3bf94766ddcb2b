"""What `train.py` and `solver.distillation` work on: a pipeline, a solver, a dataset. Imports what it loads when it
loads it, so that a command line can be read at once."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.utils.data import Dataset

    from solver.scheduling_consistency_solver import ConsistencySolverScheduler


@dataclass
class SolverRunConfig:
    """Model, data and kind of solver.

    Raises:
        ValueError: `reward_models` do not fit `rewards`, or a number of rows is below 1.
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
    initial_solver: str | None = field(default=None, metadata={"help": "a solver to go on from; the rest is its own"})
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
        if self.reward_models is None:
            self.reward_models = [None] * len(self.rewards)
        if len(self.reward_models) != len(self.rewards):
            raise ValueError(f"reward_models={self.reward_models}: expected one for each of {self.rewards}.")
        if self.num_eval_rows < 1:
            raise ValueError(f"num_eval_rows={self.num_eval_rows}: expected at least 1.")


def load_pipeline(config: SolverRunConfig) -> "DiffusionPipeline":
    """The pipeline on the CPU, with the scheduler that it came with."""
    import torch

    from data.teacher import open_pipeline

    return open_pipeline(config.model, getattr(torch, config.dtype), config.pipeline)


def make_solver(config: SolverRunConfig, pipe: "DiffusionPipeline") -> "ConsistencySolverScheduler":
    """The solver to begin with: untrained, or `initial_solver`."""
    from solver.scheduling_consistency_solver import ConsistencySolverScheduler

    if config.initial_solver is not None:
        return ConsistencySolverScheduler.from_pretrained(config.initial_solver)
    spacing = {} if config.timestep_spacing is None else {"timestep_spacing": config.timestep_spacing}
    return ConsistencySolverScheduler.from_scheduler(
        pipe.scheduler,
        order=config.solver_order,
        base_rule=config.base_rule,
        learn_weights=config.learn_weights,
        learn_grid=config.learn_grid,
        head=config.head,
        num_bins=config.num_bins,
        inputs=config.policy_inputs,
        **spacing,
    )


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
