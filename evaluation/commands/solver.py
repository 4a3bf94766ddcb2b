"""A picture in a few steps of a learned solver.

    python sample.py solver --model zoo/mini-sd --solver runs/mini_sd/best --steps 5 \\
        --prompt "a small red ring above a blue cube" --seed 7

Writes outputs/solver-1.png, or -2 and so on, or `--output`. With `--image` it is an edit: that picture, changed as the
prompt says. The PNG remembers in its text chunks how it was made; `refine --preview` reads them back.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from evaluation.commands import (
    add_picture_arguments,
    check_output,
    check_steps,
    next_output,
    picture_facts,
    pipeline_class,
)


def add_arguments(parser: ArgumentParser) -> None:
    add_picture_arguments(parser)
    parser.add_argument("--solver", required=True, help="solver folder or hub id")
    parser.add_argument("--steps", type=int, default=5)


def run(given: Namespace) -> Path:
    """Writes the picture. Raises ValueError or OSError as `evaluation.single` says."""
    check_steps(given.steps)
    output = given.output or next_output("solver")
    check_output(output)
    from evaluation.rendering import load_pipeline
    from evaluation.single import render_png, solver_scheduler

    facts = picture_facts(given)
    pipe = load_pipeline(facts["model"], given.dtype, given.device, pipeline_class(facts))
    pipe.scheduler = solver_scheduler(given.solver, pipe.scheduler, given.guidance_scale)
    facts |= {"guidance_scale": pipe.scheduler.guidance_scale, "dtype": given.dtype}
    return render_png(pipe, facts, given.steps, output, solver=given.solver)
