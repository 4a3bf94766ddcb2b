"""The same picture in full: of a preview, of a few-step picture, or of a prompt and a seed.

    python sample.py refine --pick 3
    python sample.py refine --preview previews --pick 3 --output full.png
    python sample.py refine --preview preview.png
    python sample.py refine --model zoo/mini-sd --prompt "two white stars in the sky" --seed 7

A folder is one of `sample.py preview`: its full-size run goes on where it was left; without `--preview`, `--pick`
means the last of outputs/preview-N. A PNG is one of `sample.py solver`: its prompt, seed and model are used; a model
that only the file names is not downloaded. Writes outputs/refine-1.png, or -2 and so on, or `--output`.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from data.command_line import check_dtype
from evaluation.commands import (
    KEPT,
    add_picture_arguments,
    check_output,
    check_steps,
    named_by_the_file,
    next_output,
    picture_facts,
    pipeline_class,
    refuse_unused,
)
from evaluation.commands.preview import FACTS, last_previews, save_picture

CASCADES = ("hiflow", "ralu")  # of whose pictures there is no plain run


def add_arguments(parser: ArgumentParser) -> None:
    add_picture_arguments(parser)
    parser.set_defaults(dtype=None)  # float32, or that of the previews' run
    parser.add_argument("--preview", type=Path, help="folder of `preview`, or PNG of `solver`")
    parser.add_argument("--pick", type=int, help="which preview of the folder; not needed where there is one")
    parser.add_argument(
        "--other_versions",
        action="store_true",
        help="go on with a folder though torch or diffusers are of another version, which may change the last bits",
    )
    parser.add_argument(
        "--scheduler", help="diffusers class; by default the multistep DPM-Solver, of a flow model its own"
    )
    parser.add_argument("--steps", type=int, help="default 40; a folder's run has its own number")


def run(given: Namespace) -> Path:
    """Writes the picture. Raises ValueError or OSError as `evaluation.single` and `refine` say."""
    given.output = given.output or next_output("refine")
    check_output(given.output)
    if given.preview is None and given.pick is not None:
        given.preview = last_previews()
    if given.preview and given.preview.is_file() and (given.preview.parent / FACTS).is_file() and given.pick is None:
        given.preview, given.pick = given.preview.parent, _number(given.preview)
    if given.preview and given.preview.is_dir():
        return _go_on(given)
    if given.preview and not given.preview.exists():
        raise OSError(f"--preview {given.preview}: there is no such file or folder.")
    refuse_unused(given, ("other_versions",), "only a folder of `sample.py preview` is gone on with")
    if given.pick is not None:
        raise ValueError(f"--pick {given.pick}: --preview must be a folder of `sample.py preview`.")
    steps = 40 if given.steps is None else given.steps
    check_steps(steps)
    from evaluation.rendering import load_pipeline
    from evaluation.single import full_scheduler, read_facts, render_png

    remembered = read_facts(given.preview, (*KEPT, "preview", *CASCADES)) if given.preview else {}
    if remembered.get("preview", "").isdecimal():  # else it is refined
        raise ValueError(
            f"{given.preview} is a preview whose run goes on from the files beside it; name their folder."
        )
    if cascade := [name for name in CASCADES if name in remembered]:
        raise ValueError(
            f"{given.preview} is a picture of `sample.py {cascade[0]}`, which no plain run refines. Leave --preview "
            "out, and give --model, --prompt and --seed, for the plain run of its prompt: another picture."
        )
    facts = picture_facts(given, remembered) | {"dtype": given.dtype or "float32"}
    model = facts["model"]
    with named_by_the_file("model", model, given.model):
        pipe = load_pipeline(model, facts["dtype"], given.device, pipeline_class(facts), only_here=given.model is None)
    pipe.scheduler = full_scheduler(given.scheduler, pipe.scheduler)
    return render_png(pipe, facts, steps, given.output, solver=type(pipe.scheduler).__name__)


def _number(picture: Path) -> int:
    """Of a picture of a folder of previews. Raises ValueError if it is another."""
    if not picture.stem.isdecimal():
        raise ValueError(f"--preview {picture}: which preview is meant? Name the folder, and --pick one.")
    return int(picture.stem)


def _go_on(given: Namespace) -> Path:
    """The picked run of a folder, from where it was left."""
    names = [name for name in (*KEPT, "scheduler", "steps", "dtype") if name != "model"]
    facts = _facts(given.preview)
    fixed = [name for name in names if getattr(given, name, None) is not None]
    if fixed:
        raise ValueError(f"--{fixed[0]}: the previews of {given.preview} are of a run that has begun; leave it out.")
    total = len(facts["candidates"])
    pick = 1 if given.pick is None and total == 1 else given.pick
    if pick is None or not 1 <= pick <= total:
        raise ValueError(f"--pick {pick}: expected 1 to {total}, the previews of {given.preview}.")
    from evaluation.rendering import load_pipeline
    from solver.samplers.preview import Checkpoint, refine

    checkpoint = Checkpoint.load(given.preview / str(pick))
    del facts["candidates"]
    model = given.model or facts["model"]
    with named_by_the_file("model", model, given.model):
        pipe = load_pipeline(model, facts["dtype"], given.device, only_here=given.model is None)
    picture = refine(pipe, checkpoint, other_versions=given.other_versions)
    made = {"seed": checkpoint.seed, "steps": checkpoint.num_inference_steps, "picked": given.preview / str(pick)}
    if "guidance_scale" in facts and "true_cfg_scale" not in facts:  # else no other command can make it again
        made["solver"] = type(pipe.scheduler).__name__
    return save_picture(picture, given.output, {**facts, "model": model, **made})


def _facts(folder: Path) -> dict:
    """What `preview` wrote of its folder. Raises OSError or ValueError if it is not there, or something else."""
    path = folder / FACTS
    if not path.is_file():
        raise OSError(f"--preview {folder}: there is no {FACTS} in it; name a folder of `sample.py preview`.")
    try:
        facts = json.loads(path.read_text())
        kinds = {"model": str, "dtype": str, "prompt": str, "candidates": list}
        if wrong := [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]:
            raise ValueError(f"{wrong[0]} is {facts[wrong[0]]!r}")
        check_dtype(facts["dtype"])
        return {name: facts[name] for name in (*kinds, *KEPT, "true_cfg_scale", "num_frames") if name in facts}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what `sample.py preview` wrote: {error!r}.") from error
