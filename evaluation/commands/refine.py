"""The same picture in full: of a few-step preview, or of a prompt and a seed.

python sample.py refine --preview preview.png --output full.png
python sample.py refine --model zoo/mini-sd --prompt "two white stars in the sky" --seed 7 --output full.png
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from evaluation.commands import KEPT, add_picture_arguments, check_steps, picture_facts


def add_arguments(parser: ArgumentParser) -> None:
    add_picture_arguments(parser)
    parser.add_argument("--preview", type=Path, help="PNG of this script: its prompt, seed and model are used")
    parser.add_argument(
        "--scheduler", help="diffusers class; by default the multistep DPM-Solver, of a flow model its own"
    )
    parser.add_argument("--steps", type=int, default=40)


def run(given: Namespace) -> Path:
    """Writes the picture. Raises ValueError or OSError as `evaluation.single` says."""
    check_steps(given.steps)
    from evaluation.rendering import load_pipeline
    from evaluation.single import full_scheduler, read_facts, render_png

    facts = picture_facts(given, read_facts(given.preview, KEPT) if given.preview else None)
    pipe = load_pipeline(facts["model"], given.dtype, given.device)
    pipe.scheduler = full_scheduler(given.scheduler, pipe.scheduler)
    return render_png(pipe, facts, given.steps, given.output, solver=type(pipe.scheduler).__name__)
