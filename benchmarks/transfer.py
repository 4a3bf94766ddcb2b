"""How far a learned solver carries: trained in one place, used in another.

    python -m benchmarks.transfer                                  # every solver that runs/ has, in every place
    python -m benchmarks.transfer --steps 5 --num_prompts 50       # a first look
    python -m benchmarks.transfer --solver mini-sd=runs/demo/best  # another solver of that place

A place is an evaluation: a model, a size, pictures or edits. In each, every solver is compared with its base rule and
the classical solvers of that evaluation on the same held-out prompts and noise. Where the noise schedules differ, its
policy is asked on the other model's grid (`solver/transfer.py`). Writes transfer.json and transfer.md; measurements
stay in the cache. With every solver there is, a place takes 200 x (30 + 12 x 16) network evaluations (guidance counts
once) and the choice of grids: about 12 minutes on 2 CPU cores, an hour at 128 px, estimated from single runs.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import DTYPES

if TYPE_CHECKING:
    from evaluation.config import EvaluationConfig


@dataclass(frozen=True)
class Place:
    """Where a solver is trained and used.

    Attributes:
        config: of an evaluation there.
        solver: folder of the one that was trained there; if it is not there, others are still used here.
        guidance_scale: at which it is used.
        base_grid: of solvers that come from another noise schedule, as `solver.transfer` takes it.
        changes: to the config.
    """

    config: str
    solver: str
    guidance_scale: float
    base_grid: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)


PLACES = {
    "mini-sd": Place("configs/eval_mini_sd.yaml", "runs/mini_sd/best", 3.0, {"timestep_spacing": "trailing"}),
    "mini-flux, 64 px": Place("configs/eval_mini_flux.yaml", "runs/mini_flux/best", 4.0),
    "mini-flux, 128 px": Place(
        "configs/eval_mini_flux.yaml", "runs/mini_flux_128/best", 4.0, changes={"height": 128, "width": 128}
    ),
    "edits, 64 px": Place("configs/eval_mini_kontext.yaml", "runs/mini_kontext/best", 2.0),
}


def with_solvers(places: dict[str, Place], given: Sequence[str]) -> dict[str, Place]:
    """Places with other solvers, each given as "PLACE=FOLDER". Raises ValueError for what is not there."""
    changed = dict(places)
    for text in given:
        name, equals, folder = text.partition("=")
        if name not in places or not equals:
            raise ValueError(f"--solver {text}: expected PLACE=FOLDER with one of {[*places]}.")
        if not Path(folder).is_dir():
            raise ValueError(f"--solver {text}: there is no folder {folder}.")
        changed[name] = replace(places[name], solver=folder)
    return changed


def own_scheduler(place: Place):
    """The scheduler of a place's pipeline, without its weights."""
    import diffusers
    import yaml

    from solver import ConsistencySolverScheduler

    model = yaml.safe_load(Path(place.config).read_text())["model"]
    name = ConsistencySolverScheduler.load_config(model, subfolder="scheduler")["_class_name"]
    return getattr(diffusers, name).from_pretrained(model, subfolder="scheduler")


def bring(solver: str, place: Place, folder: Path) -> str:
    """The folder of a solver for a place: its own, or a transferred copy where the noise schedules differ."""
    from solver import ConsistencySolverScheduler
    from solver.transfer import transfer

    trained, own = ConsistencySolverScheduler.from_pretrained(solver), own_scheduler(place)
    try:
        trained.check_compatible(own)
    except ValueError:
        transfer(trained, own, **place.base_grid).save_pretrained(folder)
        return str(folder)
    return solver


def evaluation_of(
    trained: str, used: str, places: dict[str, Place], output: Path, steps: Sequence[int], prompts: int, dtype: str
) -> "EvaluationConfig":
    """What is to be measured of one solver in one place. Raises ValueError if it cannot be brought there."""
    import yaml

    from evaluation.config import EvaluationConfig

    place = places[used]
    folder = output / f"{trained} on {used}".replace(", ", "_").replace(" ", "_")
    knobs = yaml.safe_load(Path(place.config).read_text()) | place.changes
    left_out = ("extra", "frechet", "fid", "scorer", "trainer_state", "trained_on", "sheet_solvers", "sheet_steps")
    knobs = {name: value for name, value in knobs.items() if name not in left_out}
    knobs |= {
        "learned": bring(places[trained].solver, place, folder / "solver"),
        "solvers": ["base", *(name for name in knobs["solvers"] if name != "base")],
        "columns": [{"guidance_scale": place.guidance_scale, "steps": list(steps), "num_prompts": prompts}],
        "output_dir": str(folder),
        "cache_dir": str(output / "cache"),
        "dtype": dtype,
    }
    return EvaluationConfig(**knobs)


def gains(metrics: dict) -> list[dict]:
    """What a solver gains over its base rule in each cell and metric, and whether it is ahead of all other rows.

    A gain in a metric that is better low is negative, as its row says.
    """
    found = []
    for entry in metrics["paired"]:
        if entry["b"] == "base":
            cell = (entry["steps"], entry["metric"])
            higher = metrics["metrics"][entry["metric"]]["higher_is_better"]
            intervals = [e["ci95"] for e in metrics["paired"] if (e["steps"], e["metric"]) == cell]
            ahead = all(low > 0 if higher else high < 0 for low, high in intervals)
            kept = {name: entry[name] for name in ("steps", "metric", "difference", "ci95")}
            found.append(kept | {"higher_is_better": higher, "ahead_of_all": ahead})
    return found


def table(rows: Sequence[dict], metric: str) -> str:
    """Markdown, a table a number of steps: down where the solver was trained, across where it is used."""
    rows = [row for row in rows if row["metric"] == metric]
    trained, used = (list(dict.fromkeys(row[name] for row in rows)) for name in ("trained", "used"))
    lines = []
    for steps in sorted({row["steps"] for row in rows}):
        lines += [
            f"### {steps} steps, {metric}{'' if rows[0]['higher_is_better'] else ' ↓'}",
            "",
            f"| trained on | {' | '.join(used)} |",
            "|---" * (len(used) + 1) + "|",
        ]
        cells = {(row["trained"], row["used"]): row for row in rows if row["steps"] == steps}
        for name in trained:
            texts = [_gain(cells[name, place]) if (name, place) in cells else "" for place in used]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def _gain(row: dict) -> str:
    low, high = row["ci95"]
    text = f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if row["ahead_of_all"] else text


HEAD = """\
# Solvers away from where they were trained

Learned minus its own base rule, paired on {prompts} held-out prompts, with 95 % intervals; guidance is {guidance};
bold where it is ahead of every classical solver of that place's evaluation too; ↓ is better low. Only what is in the
same column can be compared. Solvers: {solvers}.

{ran_on}

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--num_prompts", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--metrics", nargs="+", default=["pixels", "dino"], help="of the tables; the JSON has all")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    parser.add_argument(
        "--solver", action="append", default=[], metavar="PLACE=FOLDER", help="instead of a place's own"
    )
    args = parser.parse_args()
    try:
        places = with_solvers(PLACES, args.solver)
    except ValueError as error:
        parser.error(str(error))
    solvers = [name for name, place in places.items() if Path(place.solver).is_dir()]
    for name in (name for name in places if name not in solvers):
        print(f"{name}: no solver of its own, there is no {places[name].solver}.")
    if not solvers:
        raise SystemExit("There is no solver. Train one: configs/mini_flux.yaml and its like.")
    from evaluation.run import evaluate
    from evaluation.table import ran_on

    settings = args.output, args.steps, args.num_prompts, args.dtype
    plan = {(a, b): evaluation_of(a, b, places, *settings) for b, a in itertools.product(places, solvers)}
    if unknown := [name for name in args.metrics if any(name not in config.rewards for config in plan.values())]:
        parser.error(f"--metrics {' '.join(unknown)}: not a reward of every place.")
    rows, machines = [], []
    for (trained, used), config in plan.items():
        metrics = evaluate(config)
        rows += [{"trained": trained, "used": used, **gain} for gain in gains(metrics)]
        machines.append(ran_on(metrics))
    guidance = ", ".join(f"{place.guidance_scale:g} for {name}" for name, place in places.items())
    ran = "\n".join(dict.fromkeys(machines))
    folders = {name: places[name].solver for name in solvers}
    shown = ", ".join(f"{name}: {folder}" for name, folder in folders.items())
    head = HEAD.format(prompts=args.num_prompts, guidance=guidance, solvers=shown, ran_on=ran)
    text = head + "\n".join(table(rows, metric) for metric in args.metrics)
    (args.output / "transfer.json").write_text(json.dumps({"solvers": folders, "rows": rows}, indent=1) + "\n")
    (args.output / "transfer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
