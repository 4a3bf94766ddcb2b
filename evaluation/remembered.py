"""PNGs that remember all that decides their picture, and give it back.

    save_png(image, path, remembered(pipe, recipe, surroundings(pipe, "zoo/mini-sd", "float32", learned)))
    image, facts = read(path)
    recipe = recipe_of(facts)

What is read was perhaps written by a stranger: it is text, and numbers in their ranges, or an error.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from data.prompts import source_identity
from evaluation.recipe import Recipe, size
from evaluation.single import PREFIX, full_scheduler, open_picture
from solver import ConsistencySolverScheduler
from solver.samplers.digest import tensors_digest, weights_digest

PACKAGES = ("proofsheet", "torch", "diffusers", "transformers")


def remembered(pipe: DiffusionPipeline, recipe: Recipe, around: Mapping[str, str]) -> dict[str, str]:
    """What a PNG is told of its picture: the recipe with its size, and what was `surroundings` at the time."""
    height, width = size(pipe, recipe)
    solver = recipe.solver or type(full_scheduler(None, pipe.scheduler)).__name__
    facts = {**asdict(replace(recipe, height=height, width=width, solver=solver)), **around}
    return {name: str(value) for name, value in facts.items() if value != ""}


def surroundings(
    pipe: DiffusionPipeline, model: str, dtype: str, learned: ConsistencySolverScheduler | None = None
) -> dict[str, str]:
    """What besides the recipe may change a bit: model and weights, dtype, device, versions, the solver's weights."""
    device = torch.device(pipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    facts = {"model": model, "weights": weights_digest(pipe)[:16], "dtype": dtype, "device": name}
    if learned is not None:
        config = {name: value for name, value in learned.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(tensors_digest({} if learned.policy is None else learned.policy.state_dict()).encode())
        facts["solver_weights"] = digest.hexdigest()[:16]
    return facts | {"versions": _versions()}


def read(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """A PNG's picture, and what it remembers.

    Raises:
        OSError: there is no such file, or it is no picture.
        ValueError: it is too large, or does not say how it was made.
    """
    image, texts = open_picture(path, ["PNG"])
    facts = {name.removeprefix(PREFIX): str(text) for name, text in texts.items() if name.startswith(PREFIX)}
    if not facts:
        raise ValueError(f"{path} does not say how it was made.")
    return image, facts


def recipe_of(facts: Mapping[str, str], image: Path | None = None) -> Recipe:
    """The recipe that a PNG remembers, also one of `sample.py solver` and `refine`.

    Args:
        facts: of `read`.
        image: of an edit, the picture that was edited. The file that the PNG names is not opened.

    Raises:
        OSError: there is no such `image`.
        ValueError: something is missing, no such value can be, or `image` is not the picture that was edited.
    """
    if facts.get("preview", "").isdecimal():
        raise ValueError(
            "The picture is one of `sample.py preview`; `refine` makes its full picture, from the files beside it."
        )
    if missing := [name for name in ("prompt", "seed", "solver", "steps") if name not in facts]:
        raise ValueError(f"The picture does not say its {', '.join(missing)}, so it cannot be made again from itself.")
    if re.match(r"ralu\b", facts["solver"]):
        raise ValueError(
            f"The picture was made by `sample.py ralu`, and no recipe holds its schedule; {PREFIX}ralu says it."
        )
    kinds = {"seed": int, "steps": int, "full_steps": int, "height": int, "width": int, "guidance_scale": float}
    values = {field.name: facts[field.name] for field in fields(Recipe) if field.name in facts}
    for name in kinds.keys() & values.keys():
        try:
            values[name] = kinds[name](values[name])
        except ValueError:
            raise ValueError(f"The picture says {name} {values[name][:40]!r}, which is no number.") from None
    plain = hasattr(diffusers, values["solver"])
    values.setdefault("method", "full" if plain else "solver")
    if values["method"] == "half":  # its solver is the pipeline's own
        values.pop("solver")
    return Recipe(**values | _source(facts, image))


def _source(facts: Mapping[str, str], image: Path | None) -> dict[str, str]:
    """What a recipe says of the picture to edit: nothing, or `image`, if it is the one that was edited."""
    if "image" not in facts:
        if image is not None:
            raise ValueError(f"--image {image}: the picture is no edit; leave it out.")
        return {"image": "", "image_sha256": ""}
    name = repr(facts["image"][-80:])
    if image is None:
        raise ValueError(f"The picture is an edit of {name}, which it does not contain; give that with --image.")
    digest = source_identity(image.read_bytes()).hex()
    if facts.get("image_sha256", digest) != digest:
        raise ValueError(f"--image {image}: not the picture that was edited, {name}; its sha256 is another.")
    return {"image": str(image), "image_sha256": digest}


def _versions() -> str:
    known = {}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return ", ".join(f"{name} {number}" for name, number in known.items())
