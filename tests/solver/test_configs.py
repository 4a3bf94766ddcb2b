"""Every config that trains a solver can be read, and says what it should."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from trl import TrlParser

from solver.amed import AmedConfig
from solver.distillation import DistillationConfig
from solver.run_config import SolverRunConfig, make_solver
from solver.trainer_config import ConsistencySolverConfig

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = CONFIGS / "recipes"


def trainings() -> list[Path]:
    """The configs of train.py: they have iterations."""
    return [path for path in sorted(CONFIGS.rglob("*.yaml")) if "num_iterations" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", trainings(), ids=lambda path: path.stem)
def test_trainings(path, tmp_path):
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--report_to", "none"]
    config, args = TrlParser((SolverRunConfig, ConsistencySolverConfig)).parse_args_and_config(arguments)
    assert len(config.reward_models) == len(config.rewards)
    assert args.max_steps == args.num_iterations * args.num_ppo_epochs
    assert min(args.step_counts) >= 2


def test_there_are_trainings():
    assert {"mini_sd", "demo", "sd15_depth", "sdxl", "published_mini_sd"} <= {path.stem for path in trainings()}


PUBLISHED = {
    "published_mini_sd": {
        "solver_order": 4, "num_iterations": 3000, "group_size": 80, "max_inference_steps": 15, "num_ppo_epochs": 1,
        "learning_rate": 1e-4, "rewards": ["depth"],
    },
    "published_flux_kontext": {
        "solver_order": 2, "num_iterations": 1001, "group_size": 10, "max_inference_steps": 5, "num_ppo_epochs": 4,
        "learning_rate": 1e-3, "rewards": ["dino"],
    },
}  # fmt: skip
SHARED = {
    "num_bins": 11, "min_inference_steps": 2, "clip_range": 0.2, "weight_decay": 1e-3, "learn_grid": False,
    "lr_scheduler_type": "constant", "head": "categorical",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name, tmp_path):
    arguments = ["--config", str(RECIPES / f"{name}.yaml"), "--output_dir", str(tmp_path), "--report_to", "none"]
    config, args = TrlParser((SolverRunConfig, ConsistencySolverConfig)).parse_args_and_config(arguments)
    both = {**vars(args), **vars(config)}
    expected = PUBLISHED[name] | SHARED
    assert {key: both[key] for key in expected} == expected


def test_the_published_bins_of_flux():
    """1 + a and -a, a = 0, .1, .. 1 (released code)."""
    arguments = ["--config", str(RECIPES / "published_flux_kontext.yaml"), "--output_dir", "unused"]
    config, _ = TrlParser((SolverRunConfig, ConsistencySolverConfig)).parse_args_and_config(
        [*arguments, "--report_to", "none"]
    )
    solver = make_solver(config, SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler()))
    torch.testing.assert_close(solver.policy.action_values, torch.linspace(0, 1, 11)[None])


@pytest.mark.parametrize(("kind", "name"), [(DistillationConfig, "distilled_mini_sd"), (AmedConfig, "amed_mini_sd")])
def test_recipes(kind, name):
    (config,) = TrlParser((kind,)).parse_args_and_config(["--config", str(RECIPES / f"{name}.yaml")])
    assert config.model == "zoo/mini-sd"
