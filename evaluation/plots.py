"""Plots of metrics.json: every metric over network evaluations, the learned coefficients, the reward in training."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

LEARNED = "#d1495b"
COLOURS = ("#1f6f8b", "#7a9e35", "#c98b1b", "#6b5b95", "#4aa3a2", "#8d6e63", "#5f6b78", "#b07aa1", "#2f4858")
MARKERS = "osD^vPX<>"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def read_trainer_state(path: str) -> dict:
    """What a training logged. Raises ValueError if a file is not there, or is no trainer_state.json with rewards."""
    try:
        state = json.loads(Path(path).read_text())
        has_rewards = any("reward" in row or "eval_reward" in row for row in state["log_history"])
    except OSError as error:
        raise ValueError(f"trainer_state={path!r}: there is no such file.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"trainer_state={path!r} is no trainer_state.json: {error!r}.") from error
    if not has_rewards:
        raise ValueError(f"trainer_state={path!r}: this training logged no reward.")
    return state


def draw_plots(metrics: dict, trainer_state: dict | None, folder: Path) -> None:
    """Writes metrics_cfg_*.png, coefficients_cfg_*.png and, with a trainer state, reward.png."""
    with plt.rc_context(STYLE):
        for guidance in dict.fromkeys(row["guidance_scale"] for row in metrics["rows"]):
            plot_metrics(metrics, guidance, folder / f"metrics_cfg_{guidance:g}.png")
            tables = [entry for entry in metrics["coefficients"] if entry["guidance_scale"] == guidance]
            if tables:
                plot_coefficients(tables, folder / f"coefficients_cfg_{guidance:g}.png")
        if trainer_state is not None:
            plot_rewards(trainer_state, folder / "reward.png")


def colour_of(solver: str, solvers: Sequence[str]) -> str:
    """The learned solver is red; the others keep their colour in every plot of a run."""
    if solver == "learned":
        return LEARNED
    return COLOURS[[name for name in solvers if name != "learned"].index(solver) % len(COLOURS)]


def plot_metrics(metrics: dict, guidance: float, path: Path) -> None:
    """One panel a metric, one line a solver, the learned one with its 95 % interval; dashed: the full steps."""
    rows = [row for row in metrics["rows"] if row["guidance_scale"] == guidance]
    solvers = list(dict.fromkeys(row["solver"] for row in rows if row["solver"] != "full"))
    names = [name for name in metrics["metrics"] if any(name in row["metrics"] for row in rows)]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.7 * columns, 2.8 * lines + 0.7), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for i, solver in enumerate(solvers):
            _plot_line(axis, [row for row in rows if row["solver"] == solver], name, solver, solvers, i)
        for row in rows:
            if row["solver"] == "full" and name in row["metrics"]:
                axis.axhline(row["metrics"][name]["mean"], color="#444444", linestyle="--", linewidth=1)
        about = metrics["metrics"][name]
        axis.set_title(name.replace("_", " ") + (" (trained on)" if about["trained_on"] else ""))
        axis.set_ylabel(about["unit"] + ("" if about["higher_is_better"] else ", low is good"))
        axis.set_xticks(sorted({row["nfe"] for row in rows if row["solver"] != "full"}))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=min(8, len(labels)), bbox_to_anchor=(0.5, 0.995))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.42 / figure.get_figheight()))
    _save(figure, path)


def _plot_line(axis, rows: Sequence[dict], name: str, solver: str, solvers: Sequence[str], i: int) -> None:
    points = [(row["nfe"], row["metrics"][name]) for row in rows if name in row["metrics"]]
    if not points:
        return
    nfe = [x for x, _ in points]
    mine = solver == "learned"
    style = {"color": colour_of(solver, solvers), "zorder": 5 if mine else 2, "linewidth": 2.2 if mine else 1.3}
    marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5 if mine else 3.5}
    axis.plot(nfe, [value["mean"] for _, value in points], label=solver, **style, **marker)
    if mine:  # those of the others would hide each other; table.md has them
        low, high = zip(*(value["ci95"] for _, value in points), strict=True)
        axis.fill_between(nfe, low, high, color=style["color"], alpha=0.15, linewidth=0)


def plot_coefficients(tables: Sequence[dict], path: Path) -> None:
    """A row a step count: the grid on the left, the weights of every step on the right; learned beside base rule."""
    figure, axes = plt.subplots(
        len(tables), 2, figsize=(9, 1.7 * len(tables) + 0.9), squeeze=False, width_ratios=(1, 1.35)
    )
    for (grid, weights), table in zip(axes, tables, strict=True):
        _plot_grid(grid, table)
        _plot_weights(weights, table)
    axes[0, 0].set_title("timesteps the network is asked at")
    axes[0, 1].set_title("weights on the newest (left) to oldest prediction")
    base, learned = Line2D([], [], color="#222222", linewidth=1.3), Patch(color=LEARNED)
    figure.legend([learned, base], ["learned", "base rule"], loc="upper right", ncols=2)
    axes[-1, 0].set_xlabel("timestep, noise on the left")
    axes[-1, 1].set_xlabel("step")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    _save(figure, path)


def _plot_grid(axis, table: dict) -> None:
    for y, (name, colour) in enumerate((("base", "#8a949e"), ("learned", LEARNED))):
        t = table[name]["timesteps"]
        axis.plot(t, [y] * len(t), marker="o", markersize=5, color=colour, linewidth=1)
        if len(t) <= 6:
            for value in t:
                axis.annotate(f"{value:.0f}", (value, y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axis.set(yticks=(0, 1), ylim=(-0.5, 1.7), yticklabels=("base rule", "learned"))
    axis.set_xlim(1040, -40)
    axis.grid(axis="y", visible=False)
    axis.set_ylabel(f"{table['steps']} steps", fontweight="bold")


def _plot_weights(axis, table: dict) -> None:
    weights = {name: table[name]["weights"] for name in ("base", "learned")}
    order = len(weights["base"][0])
    width = 0.8 / order
    for j in range(order):
        x = [i + 1 - 0.4 + (j + 0.5) * width for i in range(table["steps"])]
        axis.bar(x, [row[j] for row in weights["learned"]], 0.85 * width, color=LEARNED, alpha=1 - 0.7 * j / order)
        ends = [row[j] for row in weights["base"]]
        axis.hlines(ends, [v - 0.45 * width for v in x], [v + 0.45 * width for v in x], color="#222222", linewidth=1.3)
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set_xticks(range(1, table["steps"] + 1))
    axis.grid(axis="x", visible=False)
    axis.set_xlim(0.4, table["steps"] + 0.6)


def plot_rewards(state: dict, path: Path) -> None:
    """`reward` of the training rollouts and `eval_reward` of held-out prompts over the steps of a trainer state."""
    figure, axis = plt.subplots(figsize=(6, 3))
    curves = (("reward", "training rollouts", "#9aa5b1"), ("eval_reward", "held-out prompts", LEARNED))
    for key, label, colour in curves:
        points = [(row["step"], row[key]) for row in state["log_history"] if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if len(points) < 40 else None)
    axis.set(xlabel="step", ylabel="reward", title="Reward in training")
    axis.legend()
    figure.tight_layout()
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
