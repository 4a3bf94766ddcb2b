"""Pictures from a prompt and a seed: a preview in a few steps of a learned solver, then the same picture in full.

    python sample.py solver --model zoo/mini-sd --solver runs/mini_sd/best --steps 5 \
        --prompt "a small red ring above a blue cube" --seed 7 --output preview.png
    python sample.py refine --preview preview.png --output full.png
    python sample.py refine --model zoo/mini-sd --prompt "two white stars in the sky" --seed 7 --output full.png

A PNG remembers the prompt, the seed, the model, the solver and the steps in its text chunks; `refine --preview` reads
them back.
"""

import argparse
import sys
from pathlib import Path

KEPT = ("model", "prompt", "seed", "guidance_scale", "height", "width")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", help="pipeline: hub id or local folder")
    shared.add_argument("--prompt")
    shared.add_argument("--seed", type=int)
    shared.add_argument("--guidance_scale", type=float, help="default 3")
    shared.add_argument("--height", type=int, help="in pixels; the pipeline's own by default")
    shared.add_argument("--width", type=int, help="in pixels; the pipeline's own by default")
    shared.add_argument("--output", type=Path, required=True, help="PNG file to write")
    shared.add_argument("--device", help="the GPU if there is one, by default")
    shared.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    solver = commands.add_parser("solver", parents=[shared], help="a few steps of a learned solver")
    solver.add_argument("--solver", required=True, help="solver folder or hub id")
    solver.add_argument("--steps", type=int, default=5)
    refine = commands.add_parser("refine", parents=[shared], help="the same picture with the full scheduler")
    refine.add_argument("--preview", type=Path, help="PNG of this script: its prompt, seed and model are used")
    refine.add_argument(
        "--scheduler", help="diffusers class; by default the multistep DPM-Solver, of a flow model its own"
    )
    refine.add_argument("--steps", type=int, default=40)
    return parser


def main(args: list[str] | None = None) -> Path:
    given = make_parser().parse_args(args)
    if given.steps < 1:
        raise ValueError(f"--steps {given.steps}: expected at least 1.")
    from evaluation.rendering import load_pipeline
    from evaluation.single import full_scheduler, read_facts, sample, save_png, solver_scheduler

    facts = read_facts(given.preview, KEPT) if getattr(given, "preview", None) else {}
    facts |= {key: getattr(given, key) for key in KEPT if getattr(given, key) is not None}
    facts.setdefault("guidance_scale", 3.0)
    if missing := [f"--{key}" for key in ("model", "prompt", "seed") if key not in facts]:
        raise ValueError(f"{', '.join(missing)}: needed to know which picture is meant.")
    pipe = load_pipeline(facts["model"], given.dtype, given.device)
    if given.command == "solver":
        pipe.scheduler = solver_scheduler(given.solver, pipe.scheduler, facts["guidance_scale"])
    else:
        pipe.scheduler = full_scheduler(given.scheduler, pipe.scheduler)
    image = sample(pipe, steps=given.steps, **{key: value for key, value in facts.items() if key != "model"})
    solver = given.solver if given.command == "solver" else type(pipe.scheduler).__name__
    save_png(image, given.output, {**facts, "solver": solver, "steps": given.steps})
    print(given.output)
    return given.output


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {' '.join(str(error).split())}")
