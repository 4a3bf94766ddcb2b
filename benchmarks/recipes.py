"""How many network evaluations our recipe needs for the held-out reward that the published one ends with.

    python -m benchmarks.recipes                                                                # GPU: hours
    python -m benchmarks.recipes --published_iterations 60 --iterations 40 --eval_iterations 10 # 2 CPU cores: 2 hours

All train on the dataset of `configs/build_mini_sd.yaml` with the depth reward, at guidance 3, and are judged on the
same held-out rows in 4, 5, 6 and 8 steps; the published one is trained in 2 to 15 steps, as published, ours in 3 to 8.
The published recipe is slow: 60 of its 3,000 iterations are far from its end. So there is a third, `weights only`:
ours on the published base rule and without the time grid, the solver that the published recipe trains, but for its
bins. It stands in for that end.

Writes recipes.json, recipes.md and recipes.png; finished runs are kept, others begun anew. The bar: at most a tenth of
the evaluations, in which guidance counts twice.
"""

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path

PUBLISHED, OURS, WEIGHTS_ONLY = "published", "ours", "weights only"
RECIPES: dict[str, tuple[str, list[str]]] = {  # config, and what is changed in it
    PUBLISHED: ("configs/recipes/published_mini_sd.yaml", []),
    OURS: ("configs/mini_sd.yaml", []),
    WEIGHTS_ONLY: ("configs/mini_sd.yaml", ["--base_rule", "ddim", "--learn_grid", "false"]),
}
STEPS = (4, 5, 6, 8)


def run(recipe: str, seed: int, folder: Path, iterations: int | None, eval_iterations: int) -> list[tuple[int, float]]:
    """The curve of one training: (network evaluations so far, held-out reward), the untrained solver first."""
    from trl import TrlParser

    import train
    from solver.run_config import SolverRunConfig
    from solver.trainer_config import ConsistencySolverConfig

    state, (config, changes) = folder / "trainer_state.json", RECIPES[recipe]
    if not state.exists():
        shutil.rmtree(folder, ignore_errors=True)
        parser = TrlParser((SolverRunConfig, ConsistencySolverConfig))
        epochs = str(parser.parse_args_and_config(["--config", config])[1].num_ppo_epochs)
        evaluation = ["--eval_on_start", "true", "--eval_steps", str(int(epochs) * eval_iterations)]
        evaluation += ["--eval_inference_steps", *map(str, STEPS), "--guidance_scales", "3.0"]
        rewards = ["--rewards", "depth", "--reward_models", "zoo/depth"]
        logs = ["--report_to", "none", "--logging_steps", epochs, "--save_strategy", "no"]
        length = ["--num_iterations", str(iterations)] if iterations else []
        arguments = ["--config", config, "--seed", str(seed), "--output_dir", str(folder)]
        train.main(arguments + evaluation + rewards + logs + length + changes)
    return curve(json.loads(state.read_text())["log_history"])


def curve(log: list[dict]) -> list[tuple[int, float]]:
    """(evaluations, reward) of every held-out evaluation in a log with one entry an iteration."""
    points, spent = [], 0
    for entry in log:
        spent += entry.get("network_evaluations", 0)
        if "eval_reward" in entry:
            points.append((round(spent), entry["eval_reward"]))
    return points


def evaluations_to(points: list[tuple[int, float]], reward: float) -> float | None:
    """Evaluations after which a curve stays at or above a reward, None where it never does."""
    reached = None
    for evaluations, value in reversed(points):
        if value < reward:
            break
        reached = evaluations
    return reached


def compare(curves: dict[str, dict[int, list[tuple[int, float]]]]) -> list[dict]:
    """One row a seed and recipe: where it begins and ends, what it spends, and of ours what it needs to the others."""
    rows = []
    for recipe, seeds in curves.items():
        for seed, points in seeds.items():
            row = {"seed": seed, "recipe": recipe, "untrained": points[0][1], "final": final(points)}
            row["evaluations"] = points[-1][0]
            if recipe == OURS:
                goals = {name: final(curves[name][seed]) for name in (PUBLISHED, WEIGHTS_ONLY)}
                row["needed"] = {name: evaluations_to(points, goal) for name, goal in goals.items()}
                row["published_evaluations"] = curves[PUBLISHED][seed][-1][0]
            rows.append(row)
    return rows


def final(points: list[tuple[int, float]]) -> float:
    """The reward at the end: of the last three evaluations, which scatter."""
    return statistics.mean(reward for _, reward in points[-3:])


def table(rows: list[dict]) -> str:
    head = "| recipe | seed | untrained | at the end | evaluations | to the published end | to that of weights only |"
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        needed = [_needed(row, name) for name in (PUBLISHED, WEIGHTS_ONLY)]
        ends = f"{row['untrained']:.2f} | {row['final']:.2f} | {row['evaluations']:,}"
        lines.append(f"| {row['recipe']} | {row['seed']} | {ends} | {' | '.join(needed)} |")
    return "\n".join(lines)


def _needed(row: dict, goal: str) -> str:
    """Evaluations to a goal, and their share of those that the published recipe has spent."""
    if "needed" not in row:
        return ""
    needed = row["needed"][goal]
    return "not reached" if needed is None else f"{needed:,} ({needed / row['published_evaluations']:.1%})"


def draw(curves: dict[str, dict[int, list[tuple[int, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for (recipe, seeds), colour in zip(curves.items(), ("#d1495b", "#1f6f8b", "#6a994e"), strict=True):
        for number, points in enumerate(seeds.values()):
            label = recipe if number == 0 else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3, linewidth=1.2)
    axes.set_xscale("symlog", linthresh=2000)
    axes.set(xlabel="network evaluations, guidance counts twice", ylabel="held-out depth reward, dB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="of our recipes; by default their config's")
    parser.add_argument("--published_iterations", type=int, help="of the published one; likewise")
    parser.add_argument("--eval_iterations", type=int, default=20, help="iterations between two held-out evaluations")
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    args = parser.parse_args()
    curves = {recipe: {} for recipe in RECIPES}
    for seed, recipe in itertools.product(args.seeds, RECIPES):
        folder = args.output / f"{recipe.replace(' ', '_')}-{seed}"
        iterations = args.published_iterations if recipe == PUBLISHED else args.iterations
        curves[recipe][seed] = run(recipe, seed, folder, iterations, args.eval_iterations)
    rows = compare(curves)
    (args.output / "recipes.json").write_text(json.dumps({"seeds": rows, "curves": curves}, indent=1))
    (args.output / "recipes.md").write_text(table(rows) + "\n")
    draw(curves, args.output / "recipes.png")
    print(table(rows))


if __name__ == "__main__":
    main()
