"""What a visitor typed, as recipes, or one sentence about the field that is wrong.

Everything is checked here before the device is asked: whatever comes through the page's fields, or past them.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from evaluation.recipe import LEARNED, METHODS, SMALL, Recipe, check, options

MOST_CHARACTERS = 1000  # of a prompt
MOST_PICTURES = 64  # of a run
MOST_STEPS = 200
MOST_SEED = 2**32 - 1  # the CPU generator reads no more of a seed than this
MOST_GUIDANCE = 30
MOST_AREA = 4  # of a picture, in those of the model's own size
COMPARED = (2, 4)  # fewest and most methods that are compared


class FormError(ValueError):
    """A field of the form is wrong.

    Args:
        field: its name in `Form`, or `methods` or `picks`.
        sentence: what is wrong with it.
    """

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


@dataclass
class Form:
    """The fields, as the page gives them. See `recipes` for what they may be."""

    prompts: str = ""
    negative_prompt: str = ""
    candidates: float = 8
    seed: float = 0
    is_random: bool = False
    guidance_scale: float = 3.0
    height: float | None = None
    width: float | None = None
    method: str = "few"
    steps: float = 5
    full_steps: float = 40


def recipes(form: Form, table) -> list[Recipe]:
    """The pictures of a proof sheet: for every line of the prompt, as many seeds as candidates.

    Args:
        form: prompts, one a line.
        table: the `LightTable`, which knows sizes and the learned solver.

    Raises:
        FormError: a field is empty, out of range, of the wrong kind, or not for this model.
    """
    prompts = _prompts(form.prompts)
    candidates = whole("candidates", form.candidates, 1, MOST_PICTURES)
    if len(prompts) * candidates > MOST_PICTURES:
        raise FormError(
            "candidates",
            f"{len(prompts)} prompts with {candidates} candidates are {len(prompts) * candidates} pictures; one run "
            f"makes at most {MOST_PICTURES}.",
        )
    most = MOST_SEED - candidates + 1
    seed = secrets.randbelow(most + 1) if form.is_random else whole("seed", form.seed, 0, most, "The first seed")
    base = _base(form, table)
    made = [replace(base, prompt=prompt, seed=seed + n) for prompt in prompts for n in range(candidates)]
    _check_model(table, made[0])
    return made


def compared(form: Form, methods: list[str], table) -> list[list[Recipe]]:
    """The same seeds of one prompt under several methods, a list a method. Raises FormError as `recipes`."""
    methods = [method for method in METHODS if method in (methods or ())]
    fewest, most = COMPARED
    if not fewest <= len(methods) <= most:
        raise FormError("methods", f"Choose {fewest} to {most} methods to compare.")
    first = recipes(replace(form, method="full"), table)
    if len({recipe.prompt for recipe in first}) > 1:
        raise FormError("prompts", "A comparison is of one prompt; leave one line.")
    if len(methods) * len(first) > MOST_PICTURES:
        raise FormError("candidates", f"{len(methods) * len(first)} pictures; one run makes at most {MOST_PICTURES}.")
    rows = []
    for method in methods:
        try:
            base = _base(replace(form, method=method), table)
        except FormError as error:
            raise FormError("methods" if error.field == "method" else error.field, str(error)) from error
        rows.append([replace(base, prompt=recipe.prompt, seed=recipe.seed) for recipe in first])
        _check_model(table, rows[-1][0], "methods")
    return rows


def picks(chosen: list, names: Sequence[str]) -> list[int]:
    """Positions on the sheet, from 0, of what the visitor picked.

    Args:
        chosen: names of pictures.
        names: of those that are on the sheet by now; another sheet may have been made since.

    Raises:
        FormError: nothing is picked, or something that is not there.
    """
    if not names:
        raise FormError("picks", "Make a sheet first.")
    if not chosen:
        raise FormError("picks", "Pick one or more pictures of the sheet first.")
    if not isinstance(chosen, list) or any(one not in names for one in chosen):
        raise FormError("picks", "What was picked is not on the sheet any more; pick again.")
    return [number for number, name in enumerate(names) if name in chosen]


def whole(field: str, value, least: int, most: int, called: str | None = None) -> int:
    """A whole number within its range. Raises FormError."""
    called = called or field.replace("_", " ").capitalize()
    expected = f"expected a whole number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormError(field, f"{called}: {expected}.")
    if value != int(value) or not least <= value <= most:
        raise FormError(field, f"{called} {value:.15g}: {expected}.")
    return int(value)


def _prompts(text) -> list[str]:
    lines = [line.strip() for line in text.splitlines()] if isinstance(text, str) else []
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise FormError("prompts", "Write a prompt: what the picture shows.")
    for prompt in prompts:
        _check_text("prompts", prompt)
    return prompts


def _check_text(field: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise FormError(field, f"{len(text):,} characters; a prompt has at most {MOST_CHARACTERS:,}.")
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text):
        raise FormError(field, "The prompt has characters that are no text.")


def _base(form: Form, table) -> Recipe:
    """All but prompt and seed."""
    if not isinstance(form.method, str) or form.method not in METHODS:
        raise FormError("method", f"Choose a method: {', '.join(METHODS.values())}.")
    if form.method in LEARNED and table.learned is None:
        raise FormError("method", f"{METHODS[form.method]}: the app was started without a learned solver (--solver).")
    negative = form.negative_prompt.strip() if isinstance(form.negative_prompt, str) else ""
    _check_text("negative_prompt", negative)
    guidance = form.guidance_scale
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= MOST_GUIDANCE:
        raise FormError("guidance_scale", f"Guidance: expected a number from 0 to {MOST_GUIDANCE}.")
    full_steps = whole("full_steps", form.full_steps, 1, MOST_STEPS, "Steps of a full render")
    steps = full_steps if form.method == "full" else whole("steps", form.steps, 1, MOST_STEPS)
    height, width = _size(form, table)
    return Recipe(
        prompt="",
        seed=0,
        method=form.method,
        steps=steps,
        full_steps=full_steps,
        guidance_scale=float(guidance),
        negative_prompt=negative,
        height=height,
        width=width,
        solver=table.solver if form.method in LEARNED else None,
    )


def _size(form: Form, table) -> tuple[int, int]:
    own = table.default_size
    most = MOST_AREA * own[0] * own[1]
    given = (form.height, form.width)
    height, width = (
        whole(name, default if value is None else value, 1, most // 8)
        for name, value, default in zip(("height", "width"), given, own, strict=True)
    )
    if height * width > most:
        raise FormError("height", f"{height} x {width} pixels: at most {MOST_AREA} times {own[0]} x {own[1]} here.")
    return height, width


def _check_model(table, recipe: Recipe, method: str = "method") -> None:
    """What the pipeline cannot do, at the field that asks for it. Raises FormError."""
    plain = replace(recipe, negative_prompt="")
    full = replace(plain, method="full", solver=None)
    try:
        check(table.pipe, full)
    except ValueError as error:
        raise FormError(_wrong_side(table, full), str(error)) from error
    try:
        if recipe.method in SMALL:
            options(recipe)
        check(table.pipe, plain)
    except ValueError as error:
        raise FormError(_wrong_side(table, plain) if "multiples" in str(error) else method, str(error)) from error
    try:
        check(table.pipe, recipe)
    except ValueError as error:
        raise FormError("negative_prompt", str(error)) from error


def _wrong_side(table, recipe: Recipe) -> str:
    """The side for which a size is refused: the height, unless it would do with the model's own width."""
    try:
        check(table.pipe, replace(recipe, width=table.default_size[1]))
    except ValueError:
        return "height"
    return "width"


NAMES = tuple(field.name for field in fields(Form))
