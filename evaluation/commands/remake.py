"""A picture again, from what its PNG remembers.

    python sample.py remake picture.png --output again.png
    python sample.py remake edit.png --image source.png

PNGs of `sample.py solver` and `refine` and of the light table remember prompt, seed, model, solver, steps and sizes.
On the same device, with the same weights and versions, the new picture is the old one, bit for bit; the command says
whether it is, and if not, what differs. `--model` and `--solver` say where model and learned solver are now; without
them, those that the PNG names are loaded, if they are here: a file does not decide what is downloaded. An edit
remembers the sha256 of the picture that was edited, and needs that picture.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from data.command_line import DTYPES
from evaluation.commands import check_output, named_by_the_file, pipeline_class


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("picture", type=Path, help="PNG that says how it was made")
    parser.add_argument("--image", type=Path, help="of an edit, the picture that was edited")
    parser.add_argument("--output", type=Path, help="PNG to write; NAME_again.png by default")
    parser.add_argument("--model", help="hub id or local folder, instead of what the PNG says")
    parser.add_argument("--solver", help="likewise, of the learned solver")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", choices=DTYPES, help="what the PNG says, by default")


def run(given: Namespace) -> str:
    """Writes the picture, and says how it compares. Raises ValueError or OSError as `evaluation.remembered` says."""
    from dataclasses import replace

    from evaluation.recipe import LEARNED, check, load_solver, make, picture_size
    from evaluation.remembered import read, recipe_of, remembered, surroundings
    from evaluation.rendering import load_pipeline
    from evaluation.single import save_png

    path = given.output or given.picture.with_name(f"{given.picture.stem}_again.png")
    check_output(path)
    then, facts = read(given.picture)
    recipe = recipe_of(facts, given.image)
    if given.solver and recipe.method in LEARNED:
        recipe = replace(recipe, solver=given.solver)
    model, dtype = given.model or facts.get("model"), given.dtype or facts.get("dtype", "float32")
    if model is None:
        raise ValueError(f"{given.picture} does not say its model; give --model.")
    if dtype not in DTYPES:
        raise ValueError(f"{given.picture} says dtype {dtype[:40]!r}; give --dtype.")
    with named_by_the_file("model", model, given.model):
        pipe = load_pipeline(model, dtype, given.device, pipeline_class(facts), only_here=given.model is None)
    check(pipe, recipe)
    height, width = picture_size(pipe, recipe)
    if then.size != (width, height):
        raise ValueError(
            f"{given.picture} has {then.width} x {then.height} pixels, and remembers a picture of {width} x {height}: "
            "it was changed since."
        )
    with named_by_the_file("solver", recipe.solver, given.solver):
        learned = load_solver(pipe, recipe, only_here=given.solver is None)
    again = make(pipe, recipe, learned).image
    now = remembered(pipe, recipe, surroundings(pipe, model, dtype, learned))
    save_png(again, path, now)
    return f"{path}: {compared(then, again, facts, now)}"


def compared(then, again, facts: dict[str, str], now: dict[str, str]) -> str:
    """Whether two pictures are the same, and if not, how far apart, and what differs in how they were made."""
    import torch
    from torchvision.transforms.functional import pil_to_tensor

    apart = (pil_to_tensor(then).int() - pil_to_tensor(again.convert("RGB")).int()).abs()
    if not apart.any():
        return "the same picture, bit for bit."
    changed = float((apart.amax(dim=0) > 0).to(torch.float64).mean())
    return (
        f"not the same picture bit for bit: {changed:.1%} of the pixels differ, by up to {int(apart.max())} of 255. "
        f"{_differing(facts, now)}"
    )


def _differing(facts: dict[str, str], now: dict[str, str]) -> str:
    names = [name for name in now if name in facts and not _same(facts[name], now[name])]
    names = [name for name in names if name != "image"]  # a path; its digest tells pictures apart
    if names:
        pairs = "; ".join(f"{name}: {facts[name][:200]!r} then, {now[name]!r} now" for name in names)
        return f"What differs: {pairs}."
    decisive = ("image_sha256", "weights", "device", "versions")
    unknown = [name for name in decisive if name in now and name not in facts]
    if unknown:
        return f"The file does not say its {', '.join(unknown)}; one of them may differ."
    return "All that the file remembers is the same, so the picture in it was changed, or the device rounds otherwise."


def _same(then: str, now: str) -> bool:
    """Of texts, or of the numbers that they are."""
    try:
        return float(then) == float(now)
    except ValueError:
        return then == now
