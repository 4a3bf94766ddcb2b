"""What the commands share: their arguments, the model and what looks at its pictures, and the files they write."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.quality.lines import Line
from benchmarks.quality.report import draw_figure, report_of, table, write_json
from benchmarks.quality.sheet import draw_sheet
from benchmarks.quality.study import Measured, Row, Study
from data.command_line import DTYPES
from data.prompts import read_prompts
from evaluation.instruments import Instruments
from evaluation.metrics import ClipScorer
from evaluation.rendering import Samples, load_pipeline
from rewards import load_reward

# reward -> its network in the zoo
REWARDS = {
    "pixels": None,
    "ssim": None,
    "dino": "dino",
    "dino_patches": "dino",
    "clip": "clip",
    "depth": "depth",
    "segmentation": "segmentation",
}


def parser_of(doc: str, output: str, num_prompts: int) -> argparse.ArgumentParser:
    """The arguments that the commands have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/mini-flux")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder of dino, clip, depth and segmentation")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the results and of the cache")
    parser.add_argument("--prompts", default="scenes:test", help="as data.prompts has it; of the miniature world")
    parser.add_argument("--num_prompts", type=int, default=num_prompts)
    parser.add_argument("--size", type=int, default=128, help="of the full picture, in pixels")
    parser.add_argument("--steps", type=int, default=30, help="of the full run")
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of all but the VAE, which is in float32")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--device", help="cuda where there is one, if it is left out")
    return parser


def open_model(args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline on its device."""
    return load_pipeline(args.model, args.dtype, args.device)


def open_instruments(args: argparse.Namespace, device: torch.device) -> Instruments:
    """Consistency by all rewards of `REWARDS`, the caption check, and CLIP's score of a picture."""
    models = {name: network and str(args.zoo / network) for name, network in REWARDS.items()}
    rewards = {name: load_reward(name, model, device=device) for name, model in models.items()}
    scorer = ClipScorer(models["clip"], device, rewards["clip"])
    return Instruments(list(rewards.values()), rewards["segmentation"], scorer)


def samples_of(args: argparse.Namespace, seeds_each: int = 1) -> Samples:
    """The pictures that are made; picture n has seed n, those of one prompt follow each other."""
    prompts = read_prompts(args.prompts, args.num_prompts).texts
    prompts = tuple(prompt for prompt in prompts for _ in range(seeds_each))
    return Samples(prompts, tuple(range(len(prompts))), args.guidance_scale)


def run(
    args: argparse.Namespace,
    pipe: DiffusionPipeline,
    rows: Sequence[Row],
    instruments: Instruments,
    seeds_each: int = 1,
) -> tuple[Study, list[Measured]]:
    """Prints the budget, and measures."""
    study = Study(pipe, rows, instruments, samples_of(args, seeds_each), args.output / "cache", args.batch_size)
    print(study.plan(), flush=True)
    return study, study.measure()


def finish(
    args: argparse.Namespace,
    study: Study,
    lines: Sequence[Line],
    title: str,
    mine: str,
    more: dict,
    remarks: Sequence[str] = (),
) -> dict:
    """Writes metrics.json, table.md, figure.png and contact_sheet.png, prints the table, and returns the numbers.

    Args:
        title: of the table.
        mine: the curve that the figure shows in red.
        more: further numbers for metrics.json.
        remarks: lines below the table.
    """
    about = {"model": args.model, "size": args.size, "steps": args.steps, "prompt_source": args.prompts}
    report = {**report_of(lines, study, about), **more}
    args.output.mkdir(parents=True, exist_ok=True)
    text = table(report, title, remarks)
    write_json(report, args.output / "metrics.json")
    (args.output / "table.md").write_text(text)
    draw_figure(report, mine, args.output / "figure.png")
    draw_sheet([line.measured for line in lines], study.samples, args.output / "contact_sheet.png")
    print(text)
    return report
