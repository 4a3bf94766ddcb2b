"""Time to a satisfactory picture, through the light table's own functions: full renders only, or a proof sheet first.

    python -m benchmarks.workflow --model zoo/mini-sd --solver runs/demo/best --checker zoo/segmentation \\
        --prompts 32 --seeds 8 --output runs/workflow.json

The user is that of `evaluation.workflow`: draws seeds, and accepts a picture whose caption check passes. Every seed is
rendered both ways, one picture at a time as on the page; `simulate` then says what each way of working costs for an
accepted picture, in seconds on this machine and in network evaluations. Deciding takes this user no time. (A half-size
preview is refined from its checkpoint, which is cheaper than the full render that is counted here.) One row a method.
"""

import argparse
import json
import platform
import statistics
import threading
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from torchvision.transforms.functional import to_tensor

from data.prompts import read_prompts
from evaluation.metrics import caption_check
from evaluation.recipe import LEARNED, METHODS, Recipe
from evaluation.workflow import simulate
from lighttable.table import LightTable, Picture
from rewards import Reward, load_reward

WAYS = ("full_only", "preview_first")


def accepted(checker: Reward, picture: Picture) -> bool:
    """Whether the simulated user likes it."""
    return bool(caption_check(checker.features(to_tensor(picture.image)[None]), [picture.recipe.prompt]))


def measure(table: LightTable, checker: Reward, base: Recipe, prompts: list[str], seeds: int) -> dict:
    """Both ways of working with one kind of previews.

    Args:
        table: the light table.
        checker: segmentation reward, whose labels are checked against the prompts.
        base: the previews' method, steps and guidance, and the steps of a full render.
        prompts: P of them.
        seeds: S of each, 0 .. S-1.

    Returns:
        what `simulate` says in `seconds` and in `evaluations`, and the median seconds of a picture.
    """
    never, passes, seconds, evaluations = threading.Event(), {}, {}, {}
    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    for way, recipe in (("preview", base), ("full", base.full)):
        made = table.make([replace(recipe, prompt=prompt, seed=seed) for prompt, seed in pairs], never)
        seen = [(accepted(checker, picture), picture.seconds, picture.evaluations) for picture in made]
        passes[way] = torch.tensor([ok for ok, _, _ in seen]).reshape(len(prompts), seeds)
        seconds[way] = statistics.median(time for _, time, _ in seen)
        evaluations[way] = seen[0][2]
    return {
        "method": base.method,
        "steps": base.steps,
        "seconds_per_picture": seconds,
        "evaluations_per_picture": evaluations,
        "seconds": simulate(passes["preview"], passes["full"], seconds["preview"], seconds["full"]),
        "evaluations": simulate(passes["preview"], passes["full"], evaluations["preview"], evaluations["full"]),
    }


def as_table(rows: list[dict]) -> str:
    """The rows for people."""
    lines = [f"{'previews':<36}{'s/preview':>10}{'s/full':>8}{'full only':>11}{'sheet first':>13}{'saved':>18}"]
    for row in rows:
        seconds, per = row["seconds"], row["seconds_per_picture"]
        cost = ["never" if seconds[way]["mean"] is None else f"{seconds[way]['mean']:.1f} s" for way in WAYS]
        saving = seconds["saving"]
        low, high = ("?" if end is None else f"{end:.0%}" for end in saving["ci95"])
        saved = "?" if saving["mean"] is None else f"{saving['mean']:.0%} [{low}, {high}]"
        name = f"{METHODS[row['method']]}, {row['steps']} steps"
        lines.append(f"{name:<36}{per['preview']:>10.2f}{per['full']:>8.2f}{cost[0]:>11}{cost[1]:>13}{saved:>18}")
    return "\n".join(lines)


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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args(args)
    table = LightTable.open(given.model, given.dtype, given.device, given.solver)
    table.warm_up()
    checker = load_reward("segmentation", model=given.checker, device=table.pipe.device)
    prompts = list(read_prompts("scenes:test", given.prompts).texts)
    rows = []
    for method in given.methods or (["solver", "few"] if given.solver else ["few"]):
        solver = given.solver if method in LEARNED else None
        base = Recipe("", 0, method, given.steps, given.full_steps, given.guidance_scale, solver=solver)
        rows.append(measure(table, checker, base, prompts, given.seeds))
    print(as_table(rows))
    if given.output:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
        report = {"model": given.model, "prompts": given.prompts, "seeds": given.seeds, "rows": rows, **versions}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
