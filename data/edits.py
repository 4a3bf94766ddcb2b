"""Edits of scenes of the miniature world: an instruction in words, and the scene it should lead to."""

import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from data.world import (
    BACKGROUNDS,
    COLOURS,
    FINISHES,
    SHAPES,
    SIZES,
    Scene,
    Solid,
    fits,
    nearest_last,
    new_solid,
    place,
)

if TYPE_CHECKING:
    from collections.abc import Callable

EDITS = ("recolour", "remove", "add", "move", "replace", "background")

_PHRASES = {
    "recolour": ("make {} {}", "turn {} {}", "paint {} {}"),
    "remove": ("remove {}", "take away {}"),
    "add": ("add a {}",),
    "move": ("move {} {}",),
    "replace": ("replace {} with {}",),
    "background": ("change the background to {}", "put it against {}"),
}
_PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
_NUMBERS = ("the", "both", "all three", "all four")
_DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SETTING = {
    "sky": "the sky",
    "dusk": "dusk",
    "sand": "sand",
    "studio": "a studio",
    "brick": "a brick wall",
    "grass": "grass",
}


def edit(scene: Scene, rng: random.Random, kind: str | None = None) -> tuple[str, Scene]:
    """An instruction and the edited scene, which stays in the scene's split.

    What the instruction does not speak of stays as it was, to the pixel.

    Args:
        kind: one of `EDITS`; None draws one that this scene allows.

    Raises:
        ValueError: if `kind` is unknown, or this scene allows no such edit (removing the only solids, adding a fifth).
    """
    if kind is not None and kind not in EDITS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(EDITS)}.")
    for attempt in range(6000):  # most scenes need a few; some of the rarer splits more than 60
        chosen = kind or EDITS[attempt % len(EDITS) if attempt >= 30 else rng.randrange(len(EDITS))]
        result = _EDITS[chosen](scene, rng)
        if result is not None and result[1] != scene and result[1].split == scene.split:
            return result
    raise ValueError(f"No {kind or 'edit'} was found for this scene of {len(scene.solids)} solids: {scene}.")


def numbered_edit(number: int, split: str = "train") -> tuple[str, Scene, Scene]:
    """Instruction, source and edited scene of edit number `number` of a split: a pure function of both.

    The source is `Scene.random(number, split)`.

    Raises:
        ValueError: if `split` is not one of `data.world.SPLITS`.
    """
    scene = Scene.random(number, split)
    instruction, edited = edit(scene, random.Random(f"edit:{split}:{int(number)}"))
    return instruction, scene, edited


def edit_vocabulary() -> list[str]:
    """Every word that an instruction can hold, sorted."""
    texts = [*COLOURS, *SHAPES, *SIZES, *FINISHES, *_PLURAL.values(), *_NUMBERS, *_DIRECTIONS, *_SETTING.values()]
    texts += [phrase for phrases in _PHRASES.values() for phrase in phrases]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})


def _name(group: list[Solid]) -> str:
    """The red ball; both red balls."""
    shape, colour = group[0].pair
    noun = shape if len(group) == 1 else _PLURAL[shape]
    return f"{_NUMBERS[len(group) - 1]} {colour} {noun}"


def _with(scene: Scene, old: list[Solid], new: list[Solid]) -> Scene | None:
    """The scene with some solids replaced, or None where the new ones do not fit among the rest."""
    standing = [solid for solid in scene.solids if solid not in old]
    for solid in new:
        if not fits(solid, standing):
            return None
        standing.append(solid)
    return replace(scene, solids=nearest_last(standing))


def _recoloured(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    group = rng.choice(scene.groups())
    colour = rng.choice(COLOURS)
    if any(solid.pair == (group[0].shape, colour) for solid in scene.solids):
        return None
    edited = _with(scene, group, [replace(solid, colour=colour) for solid in group])
    words = rng.choice(_PHRASES["recolour"])
    return edited and (words.format(_name(group), colour), edited)


def _removed(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    groups = scene.groups()
    if len(groups) < 2:
        return None
    group = rng.choice(groups)
    return rng.choice(_PHRASES["remove"]).format(_name(group)), _with(scene, group, [])


def _added(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    if len(scene.solids) >= 4:
        return None
    size = rng.choice(SIZES) if len(scene.solids) < 2 else "small"
    solid = new_solid(rng.choice(SHAPES), rng.choice(COLOURS), size, rng.choice(FINISHES), rng)
    placed = place(solid, list(scene.solids), rng)
    if placed is None or any(other.pair == placed.pair for other in scene.solids):
        return None
    finish = "" if placed.finish == "plain" else f"{placed.finish} "
    words = f"{placed.size} {finish}{placed.colour} {placed.shape}"
    return _PHRASES["add"][0].format(words), replace(scene, solids=nearest_last([*scene.solids, placed]))


def _moved(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    group = rng.choice(scene.groups())
    if len(group) > 1:
        return None
    direction, (dx, dy) = rng.choice(list(_DIRECTIONS.items()))
    step = rng.uniform(0.25, 0.4)
    moved = replace(group[0], x=group[0].x + step * dx, y=group[0].y + step * dy)
    edited = _with(scene, group, [moved])
    return edited and (_PHRASES["move"][0].format(_name(group), direction), edited)


def _replaced(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    group = rng.choice(scene.groups())
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    if shape == group[0].shape or any(solid.pair == (shape, colour) for solid in scene.solids):
        return None
    edited = _with(scene, group, [replace(solid, shape=shape, colour=colour) for solid in group])
    what = f"a {colour} {shape}" if len(group) == 1 else f"{colour} {_PLURAL[shape]}"
    return edited and (_PHRASES["replace"][0].format(_name(group), what), edited)


def _moved_elsewhere(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    background = rng.choice(BACKGROUNDS)
    words = rng.choice(_PHRASES["background"])
    return words.format(_SETTING[background]), replace(scene, background=background)


_EDITS: "dict[str, Callable[[Scene, random.Random], tuple[str, Scene] | None]]" = {
    "recolour": _recoloured,
    "remove": _removed,
    "add": _added,
    "move": _moved,
    "replace": _replaced,
    "background": _moved_elsewhere,
}
