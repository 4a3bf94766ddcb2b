"""Time to a satisfactory picture, through the light table's own functions: full renders only, or a proof sheet first.

    python -m benchmarks.workflow --model zoo/mini-sd --solver runs/demo/best --checker zoo/segmentation \\
        --prompts 32 --seeds 8 --output runs/workflow.json

The user is that of `evaluation.workflow`: draws seeds, and accepts a picture whose caption check passes. Every seed is
rendered both ways, one picture at a time as on the page; `simulate` then says what each way of working costs for an
accepted picture, in seconds on this machine and in network evaluations (guidance counts once). Deciding takes this
user no time. A half-size preview is refined from its checkpoint: one of each prompt is, and those are timed. One row a
method; the full renders are made once for all.
"""

import argparse
import json
import platform
import statistics
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from torchvision.transforms.functional import to_tensor

from data.command_line import DTYPES
from data.prompts import read_prompts
from evaluation.metrics import caption_check
from evaluation.recipe import LEARNED, METHODS, Recipe
from evaluation.workflow import simulate
from lighttable.table import LightTable, Picture
from rewards import Reward, load_reward

WAYS = ("full_only", "preview_first")
UNITS = ("seconds", "evaluations")


def accepted(checker: Reward, picture: Picture) -> bool:
    """Whether the simulated user likes it."""
    return bool(caption_check(checker.features(to_tensor(picture.image)[None]), [picture.recipe.prompt]))


class Seen(NamedTuple):
    """What all prompts and seeds gave: which pictures passed, bool (P, S), and what one took (median seconds)."""

    passes_PS: torch.Tensor
    seconds: float
    evaluations: int


def look(table: LightTable, checker: Reward, base: Recipe, prompts: list[str], seeds: int) -> tuple[Seen, Seen | None]:
    """Makes the pictures of a method one by one, and checks each.

    Args:
        table: the light table.
        checker: segmentation reward, whose labels are checked against the prompts.
        base: method, steps and guidance.
        prompts: P of them.
        seeds: S of each, 0 .. S-1.

    Returns:
        what was seen, and, if the previews have begun their full renders, what it took to finish the first of each
        prompt (and nothing of whether it passes: it is the full render).
    """
    never, passes, seconds, finished = threading.Event(), [], [], []
    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    for picture in table.make([replace(base, prompt=prompt, seed=seed) for prompt, seed in pairs], never):
        passes.append(accepted(checker, picture))
        seconds.append(picture.seconds)
        if picture.checkpoint is not None and picture.recipe.seed == 0:
            finished.append(table.refine(picture, never))
    passes_PS = torch.tensor(passes).reshape(len(prompts), seeds)
    seen = Seen(passes_PS, statistics.median(seconds), picture.evaluations)
    if not finished:
        return seen, None
    return seen, Seen(passes_PS, statistics.median(one.seconds for one in finished), finished[0].evaluations)


def measure(table: LightTable, checker: Reward, base: Recipe, full: Seen, prompts: list[str], seeds: int) -> dict:
    """Both ways of working with one kind of previews.

    Args:
        table, checker, prompts, seeds: as in `look`.
        base: the previews' method, steps and guidance, and the steps of a full render.
        full: what the full renders gave.

    Returns:
        what `simulate` says in `seconds` and in `evaluations`, and what one picture took.
    """
    preview, refined = look(table, checker, base, prompts, seeds)
    took = {"preview": preview, "full": full, "refine": refined or full}
    row = {"method": base.method, "steps": base.steps}
    for unit in UNITS:
        each = {name: getattr(seen, unit) for name, seen in took.items()}
        costs = {"preview_cost": each["preview"], "full_cost": each["full"], "refine_cost": each["refine"]}
        row |= {f"{unit}_per_picture": each, unit: simulate(preview.passes_PS, full.passes_PS, **costs)}
    return row


def as_table(rows: list[dict]) -> str:
    """The rows for people, once in each unit."""
    lines = [
        "| previews | unit | a preview | a full render | to finish one | full renders only | sheet first | saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = METHODS[row["method"]] + ("" if row["method"] == "half" else f", {row['steps']} steps")
        for unit in UNITS:
            each = (f"{row[f'{unit}_per_picture'][one]:.4g}" for one in ("preview", "full", "refine"))
            cells = [name, unit, *each, *(_interval(row[unit][way], ".4g") for way in WAYS)]
            lines.append(f"| {' | '.join([*cells, _interval(row[unit]['saving'], '.0%', '?')])} |")
    return "\n".join(lines)


def _interval(estimate: dict, style: str, unbounded: str = "never") -> str:
    """86 [40, never]: a mean and its 95 % interval; of costs, infinity is a picture that never comes."""
    numbers = (estimate["mean"], *estimate["ci95"])
    mean, low, high = (unbounded if one is None else format(one, style) for one in numbers)
    return f"{mean} [{low}, {high}]"


def main(args: list[str] | None = None) -> list[dict]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="zoo/mini-sd", help="pipeline: hub id or local folder")
    parser.add_argument("--solver", help="learned solver; without, only plain few steps are measured")
    parser.add_argument("--checker", default="zoo/segmentation", help="segmentation network")
    parser.add_argument("--methods", nargs="+", choices=[name for name in METHODS if name != "full"])
    parser.add_argument("--steps", type=int, default=5, help="of a preview")
    parser.add_argument("--full_steps", type=int, default=40)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=32, help="how many held-out captions")
    parser.add_argument("--seeds", type=int, default=8, help="of each prompt")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(args)
    table = LightTable.open(given.model, given.dtype, given.device, given.solver)
    table.warm_up()
    checker = load_reward("segmentation", model=given.checker, device=table.pipe.device)
    prompts = list(read_prompts("scenes:test", given.prompts).texts)
    height, width = table.default_size
    plain = Recipe("", 0, "full", given.full_steps, given.full_steps, given.guidance_scale, "", height, width)
    full, _ = look(table, checker, plain, prompts, given.seeds)
    rows = []
    for method in given.methods or (["solver", "few"] if given.solver else ["few"]):
        solver = given.solver if method in LEARNED else None
        base = replace(plain, method=method, steps=given.steps, solver=solver)
        rows.append(measure(table, checker, base, full, prompts, given.seeds))
    print(as_table(rows))
    if given.output:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
        report = {"model": given.model, "prompts": given.prompts, "seeds": given.seeds, "rows": rows, **versions}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
