"""What makes the learned solver: weights, grid or both; order, base rule, head, reward, exploration.

    python -m benchmarks.ablations                      # trains every row that runs/ablations lacks
    python -m benchmarks.ablations --rows order_2 bins  # or some of them
    python evaluate.py --config configs/eval_ablations.yaml

Every row is `configs/mini_sd.yaml` with one change, trained in two cells only, 5 and 8 steps at guidance 3, on as many
rollouts as any other. 2 CPU cores: 3 minutes a row.
"""

import argparse
import shutil
from pathlib import Path

CONFIG = "configs/mini_sd.yaml"
CELLS = ["--inference_steps", "5", "8", "--eval_inference_steps", "5", "8", "--guidance_scales", "3.0"]
ROWS: dict[str, list[str]] = {
    "both": [],
    "weights_only": ["--learn_grid", "false"],  # as published
    "grid_only": ["--learn_weights", "false"],
    "order_2": ["--solver_order", "2"],
    "order_3": ["--solver_order", "3"],
    "order_5": ["--solver_order", "5"],
    "order_6": ["--solver_order", "6"],
    "on_ddim": ["--base_rule", "ddim"],
    "bins": ["--head", "categorical", "--antithetic", "false", "--entropy_coef", "0.001"],
    "bins_21": ["--head", "categorical", "--num_bins", "21", "--antithetic", "false", "--entropy_coef", "0.001"],
    "depth_reward": ["--rewards", "depth", "--reward_models", "zoo/depth"],
    "large_groups": ["--prompts_per_iteration", "2", "--group_size", "16"],
    "clip_0.2": ["--clip_range", "0.2"],
    "wide_exploration": ["--exploration_std", "0.24", "--final_exploration_std", "0.08"],
}


def train_row(name: str, output: Path, iterations: int, seed: int) -> None:
    """Trains one row, unless its folder has a finished run."""
    from trl import TrlParser

    import train
    from solver.run_config import SolverRunConfig
    from solver.trainer_config import ConsistencySolverConfig

    folder = output / name
    if (folder / "trainer_state.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a run that did not end
    parser = TrlParser((SolverRunConfig, ConsistencySolverConfig))
    epochs = parser.parse_args_and_config(["--config", CONFIG])[1].num_ppo_epochs
    length = ["--num_iterations", str(iterations), "--eval_steps", str(epochs * max(1, iterations // 4))]
    quiet = ["--save_strategy", "no", "--report_to", "none", "--contact_sheet_rows", "0"]
    arguments = ["--config", CONFIG, "--output_dir", str(folder), "--seed", str(seed)]
    train.main(arguments + CELLS + length + quiet + ROWS[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--iterations", type=int, default=32, help="of 32 rollouts; 16 for each cell, as in the config"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    for name in args.rows:
        train_row(name, args.output, args.iterations, args.seed)


if __name__ == "__main__":
    main()
