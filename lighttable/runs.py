"""What a visitor can have done: a sheet, refinements of its picks, a comparison. Each yields after every picture."""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from evaluation.recipe import Recipe
from lighttable.table import LightTable, Tell
from lighttable.visit import Kept, Visit


class Refined(NamedTuple):
    """A pick, its full render, and how alike they are, by reward."""

    preview: Kept
    full: Kept
    scores: dict[str, float]

    def side_by_side(self) -> tuple[Image.Image, Image.Image]:
        """Both pictures at the size of the full one."""
        small, full = self.preview.picture().image, self.full.picture().image
        return small.resize(full.size, Image.Resampling.LANCZOS) if small.size != full.size else small, full


def sheet(
    table: LightTable, visit: Visit, recipes: Sequence[Recipe], stop: threading.Event, tell: Tell
) -> Iterator[list[Kept]]:
    """A new proof sheet; yields it as it grows. Raises as `LightTable.make`."""
    visit.sheet, visit.refined = [], []
    for picture in table.make(recipes, stop, tell):
        visit.sheet.append(visit.keep(picture))
        yield visit.sheet


def refinements(
    table: LightTable, visit: Visit, picks: Sequence[int], stop: threading.Event, tell: Tell
) -> Iterator[list[Refined]]:
    """Full renders of some pictures of the sheet; yields them as they are made. Raises as `LightTable.refine`."""
    for done, number in enumerate(picks):
        kept = visit.sheet[number]
        preview = kept.picture()
        full = table.refine(preview, stop, lambda share, done=done: tell((done + share) / len(picks)))
        refined = Refined(kept, visit.keep(full), table.scores(preview.image, full.image))
        visit.refined = [one for one in visit.refined if one.preview != kept] + [refined]
        yield visit.refined


def comparison(
    table: LightTable, visit: Visit, rows: Sequence[Sequence[Recipe]], stop: threading.Event, tell: Tell
) -> Iterator[list[list[Kept]]]:
    """The same seeds under several methods, a row each; yields the rows as they grow. Raises as `LightTable.make`."""
    made: list[list[Kept]] = [[] for _ in rows]
    pictures = table.make([recipe for row in rows for recipe in row], stop, tell)
    for i, picture in enumerate(pictures):
        made[i // len(rows[0])].append(visit.keep(picture))
        yield made
