"""How many network evaluations our recipe needs for the held-out reward that the published one ends with.

    python -m benchmarks.recipes --seeds 0 1 2 --output benchmarks/results/recipes           # GPU
    python -m benchmarks.recipes --seeds 0 --published_iterations 60 --eval_iterations 10    # a first look on a CPU

Both train on the dataset of `configs/build_mini_sd.yaml` with the depth reward, at guidance 3, and are judged on the
same held-out rows in 4, 5, 6 and 8 steps. Writes recipes.json, recipes.md and recipes.png; finished runs are kept. The
bar: at most a tenth of the evaluations, in which guidance counts twice.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

RECIPES = {"ours": "configs/mini_sd.yaml", "published": "configs/recipes/published_mini_sd.yaml"}
STEPS = (4, 5, 6, 8)


def run(recipe: str, seed: int, folder: Path, iterations: int | None, eval_iterations: int) -> list[tuple[int, float]]:
    """The curve of one training: (network evaluations so far, held-out reward), the untrained solver first."""
    from trl import TrlParser

    import train
    from solver.run_config import SolverRunConfig
    from solver.trainer_config import ConsistencySolverConfig

    state = folder / "trainer_state.json"
    if not state.exists():
        parser = TrlParser((SolverRunConfig, ConsistencySolverConfig))
        epochs = str(parser.parse_args_and_config(["--config", RECIPES[recipe]])[1].num_ppo_epochs)
        evaluation = ["--eval_on_start", "true", "--eval_steps", str(int(epochs) * eval_iterations)]
        evaluation += ["--eval_inference_steps", *map(str, STEPS), "--guidance_scales", "3.0"]
        rewards = ["--rewards", "depth", "--reward_models", "zoo/depth"]
        logs = ["--report_to", "none", "--logging_steps", epochs, "--save_strategy", "no"]
        length = ["--num_iterations", str(iterations)] if iterations else []
        arguments = ["--config", RECIPES[recipe], "--seed", str(seed), "--output_dir", str(folder)]
        arguments += evaluation + rewards + logs + length
        train.main(arguments)
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
    """One row a seed: the published recipe's final reward and what each recipe spent to reach it."""
    rows = []
    for seed, published in curves["published"].items():
        final = statistics.mean(reward for _, reward in published[-3:])  # its last evaluations scatter
        ours = curves["ours"][seed]
        needed = evaluations_to(ours, final)
        rows.append(
            {
                "seed": seed,
                "untrained": {"ours": ours[0][1], "published": published[0][1]},
                "final": {"ours": ours[-1][1], "published": final},
                "published_evaluations": published[-1][0],
                "ours_evaluations": needed,
                "share": None if needed is None else needed / published[-1][0],
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    head = "| seed | published: untrained → final | ours: untrained → final | published evaluations | ours to there |"
    lines = [head, "|---" * 5 + "|"]
    for row in rows:
        spent = "not reached" if row["share"] is None else f"{row['ours_evaluations']:,} ({row['share']:.1%})"
        changes = [f"{row['untrained'][name]:.2f} → {row['final'][name]:.2f}" for name in ("published", "ours")]
        lines.append(f"| {row['seed']} | {changes[0]} | {changes[1]} | {row['published_evaluations']:,} | {spent} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[int, list[tuple[int, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for (recipe, seeds), colour in zip(curves.items(), ("#d1495b", "#1f6f8b"), strict=True):
        for number, points in enumerate(seeds.values()):
            label = recipe if number == 0 else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3, linewidth=1.2)
    axes.set(xscale="symlog", xlabel="network evaluations, guidance counts twice", ylabel="held-out depth reward, dB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="of our recipe; by default its config's")
    parser.add_argument("--published_iterations", type=int, help="of the published one; likewise")
    parser.add_argument("--eval_iterations", type=int, default=20, help="iterations between two held-out evaluations")
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    args = parser.parse_args()
    length = {"ours": args.iterations, "published": args.published_iterations}
    curves = {recipe: {} for recipe in RECIPES}
    for seed, recipe in itertools.product(args.seeds, RECIPES):
        folder = args.output / f"{recipe}-{seed}"
        curves[recipe][seed] = run(recipe, seed, folder, length[recipe], args.eval_iterations)
    rows = compare(curves)
    (args.output / "recipes.json").write_text(json.dumps({"seeds": rows, "curves": curves}, indent=1))
    (args.output / "recipes.md").write_text(table(rows) + "\n")
    draw(curves, args.output / "recipes.png")
    print(table(rows))


if __name__ == "__main__":
    main()
