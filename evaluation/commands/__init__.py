"""The commands of `sample.py`, a module each, with two functions:

    add_arguments(parser)   # of argparse
    run(given)              # the parsed arguments; returns the file it wrote

All modules are imported to parse, so whatever is heavy is imported inside `run`: `--help` answers at once. That is
also why they are here and not in `solver`, which cannot be imported without torch.
"""

import itertools
import os
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.command_line import DTYPES
from data.prompts import source_identity
from evaluation.config import MOST_STEPS, check_guidance, is_step_count

OUTPUTS = Path("outputs")  # where pictures go for which no --output is given
GUIDANCE_SCALE = 3.0  # where nothing is said
# What a PNG remembers.
KEPT = ("model", "prompt", "negative_prompt", "seed", "guidance_scale", "height", "width", "image", "image_sha256")


def add_picture_arguments(parser: ArgumentParser) -> None:
    """Which picture: model, prompts, seed, guidance, size, what it edits; where it is made and written."""
    parser.add_argument("--model", help="pipeline: hub id or local folder")
    parser.add_argument("--prompt")
    parser.add_argument("--negative_prompt", help="what the picture shall not show; needs guidance above 1")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--guidance_scale", type=float, help="default 3, with `--solver` that of the solver")
    parser.add_argument("--height", type=int, help="in pixels; the pipeline's own by default")
    parser.add_argument("--width", type=int, help="in pixels; the pipeline's own by default")
    parser.add_argument("--image", help="picture to edit, with a FLUX Kontext model; the prompt is what to do")
    add_output_arguments(parser)


def add_output_arguments(parser: ArgumentParser) -> None:
    """Where a picture is made and written."""
    parser.add_argument("--output", type=Path, help="PNG file to write; the next of outputs/COMMAND-N.png by default")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)


def picture_facts(given: Namespace, remembered: dict | None = None) -> dict:
    """Which picture is meant: what was given, over what a file remembers.

    Raises:
        ValueError: model, prompt or seed is in neither, the guidance scale is no finite number, or the picture to edit
            is not there, or not the one that was remembered.
    """
    here = {key: getattr(given, key, None) for key in KEPT}
    facts = (remembered or {}) | {key: value for key, value in here.items() if value is not None}
    check_guidance("--guidance_scale", facts.setdefault("guidance_scale", GUIDANCE_SCALE))
    if missing := [f"--{key}" for key in ("model", "prompt", "seed") if key not in facts]:
        raise ValueError(f"{', '.join(missing)}: needed to know which picture is meant.")
    if "image" in facts and not Path(facts["image"]).is_file():
        raise ValueError(f"--image {facts['image']}: there is no such file; name the picture to edit.")
    if "image" in facts:
        digest = source_identity(Path(facts["image"]).read_bytes()).hex()
        if here["image"] is None and facts.get("image_sha256", digest) != digest:
            raise ValueError(f"{facts['image']} has changed since it was edited; say which picture with --image.")
        facts["image_sha256"] = digest
    return facts


def pipeline_class(facts: Mapping[str, object]) -> str | None:
    """Of diffusers, for a picture: the one that edits, or None for the model's own."""
    return "FluxKontextPipeline" if "image" in facts else None


@contextmanager
def named_by_the_file(part: str, name: str, given: str | None) -> Iterator[None]:
    """Says how to fetch what only a file names: a file does not decide what is downloaded."""
    try:
        yield
    except OSError as error:
        if given is not None or Path(name).is_dir():
            raise
        raise OSError(f"{error} To fetch what the file names, say so: --{part} {shlex.quote(name)}") from error


def next_output(name: str, suffix: str = ".png") -> Path:
    """The first of outputs/NAME-1.png, outputs/NAME-2.png, ... that is not there yet."""
    paths = (OUTPUTS / f"{name}-{number}{suffix}" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def check_output(path: Path) -> None:
    """Raises OSError, before the work, where no file can be written, ValueError if the file is named as no PNG.

    What is missing above it is not made yet.
    """
    if path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"--output {path}: pictures are PNG files, which remember how they were made; name a .png.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"--output {path}: no file can be written there; name another.")


def refuse_unused(given: Namespace, names: Sequence[str], why: str) -> None:
    """Raises ValueError if one of these flags was given: nothing would come of it."""
    values = {name: getattr(given, name) for name in names}
    if used := [f"--{name}" for name, value in values.items() if value is not None and value is not False]:  # 0 counts
        raise ValueError(f"{', '.join(used)}: {why}; leave it out.")


def check_steps(*counts: int | None, option: str = "--steps") -> None:
    """Raises ValueError for less than one step, or more than a noise schedule has. None is left out."""
    for count in counts:
        if count is not None and not is_step_count(count):
            raise ValueError(f"{option} {count}: expected at least 1 and at most {MOST_STEPS}.")
