"""The sentences and tables of the page, as HTML in which whatever a visitor typed is text."""

import textwrap
from collections.abc import Iterable, Sequence
from html import escape

from evaluation.recipe import METHODS, Recipe
from lighttable.table import Estimate

MOST_OF_A_PROMPT = 60  # letters in a title
UNITS = {"pixels": "dB", "depth": "dB", "segmentation": "%", "ssim": "%"}  # of the scores; the others go to 100


def said(sentence: str) -> str:
    """What happened; the place where it is shown says it to a screen reader."""
    return f'<p class="said">{escape(sentence)}</p>' if sentence else ""


def wrong(sentence: str) -> str:
    """What is wrong with a field."""
    return f'<p class="wrong" role="alert">{escape(sentence)}</p>' if sentence else ""


def costs(estimate: Estimate) -> str:
    """What a run will cost."""
    time = "" if estimate.seconds is None else f", about {duration(estimate.seconds)}"
    renders = "1 full render" if estimate.pictures == 1 else f"{estimate.pictures} full renders"
    return (
        f"{count(estimate.pictures, 'picture')}, {count(estimate.evaluations, 'network evaluation')} (guidance counts "
        f"once){time}: {estimate.share:.0%} of the work of {renders}."
    )


def saved(sheet: Estimate, refined: Sequence[int], full_steps: int) -> str:
    """What looking at a sheet and refining some of it took, beside full renders of all of the sheet.

    Args:
        sheet: of the previews.
        refined: evaluations at full size of each refinement.
        full_steps: of a full render.
    """
    whole = sheet.pictures * full_steps
    share = sheet.share + sum(refined) / whole
    done = f"The sheet and {count(len(refined), 'refinement')} took {share:.0%} of the work of"
    return f"{done} {sheet.pictures} full renders{f': {1 - share:.0%} saved' if share < 1 else ''}."


def scores_table(rows: Iterable[tuple[str, dict[str, float]]]) -> str:
    """Scores of previews against their full renders: a row (title, scores) a picture."""
    rows = list(rows)
    if not rows:
        return ""
    names = list(rows[0][1])
    head = "".join(f'<th scope="col">{escape(_with_unit(name))}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(title)}</th>'
        + "".join(f"<td>{scores[name]:.1f}</td>" for name in names)
        + "</tr>"
        for title, scores in rows
    )
    caption = "How alike preview and full render are; higher is more alike"
    return (
        f'<table class="scores"><caption>{caption}</caption><thead><tr><th scope="col">Picture</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def facts_table(facts: dict[str, str]) -> str:
    """What a PNG remembers."""
    rows = "".join(_row(name, [value]) for name, value in facts.items())
    return f'<table class="facts"><caption>How it was made</caption><tbody>{rows}</tbody></table>'


def title(recipe: Recipe, several: bool = False) -> str:
    """A picture in a few words; its prompt where there are several."""
    steps = "" if recipe.method == "half" else f", {count(recipe.steps, 'step')}"
    return f"Seed {recipe.seed}: {METHODS[recipe.method]}{steps}" + _prompt(recipe, several)


def caption(number: int, recipe: Recipe, several: bool) -> str:
    """What stands under a picture of a sheet; its prompt where there are several."""
    return f"{number} · seed {recipe.seed}" + _prompt(recipe, several)


def _prompt(recipe: Recipe, several: bool) -> str:
    return f" · {textwrap.shorten(recipe.prompt, MOST_OF_A_PROMPT, placeholder=' …')}" if several else ""


def count(number: int, noun: str) -> str:
    """1 picture, 8 pictures."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def _with_unit(name: str) -> str:
    return f"{name} ({UNITS[name]})" if name in UNITS else name


def _row(name: str, cells: Iterable[str]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
