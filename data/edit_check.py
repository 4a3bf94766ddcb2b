"""Whether an edited picture of the miniature world is what its instruction asked for, and nothing else."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.captions import centres
from data.rendering import render, render_batch
from data.world import BACKGROUNDS, COLOURS, SHAPES

if TYPE_CHECKING:
    from data.world import Scene

_NEAR = 0.12  # of the picture's side: a solid is where it should be
_MOVED = 0.1  # and has been moved


def check_edit(
    image_CHW: torch.Tensor, segmentation_HW: torch.Tensor, source: "Scene", edited: "Scene"
) -> dict[str, bool]:
    """Compares a picture with the scene that an edit leads to.

    * `done`: the solids that the edit changes are there as often as they should be (removed ones: not at all), those
      that replace others in their places, moved ones away in the right direction; or the background is new;
    * `untouched`: all other solids are where they were, no others have come, and the background is the old one.

    Args:
        image_CHW: the picture, in [0, 1].
        segmentation_HW: its class ids, predicted or true, at any size.
        source: the scene before the edit.
        edited: the scene after it, as `edit` gives it.

    Returns:
        the two answers.
    """
    labels_HW = np.asarray(segmentation_HW.cpu())
    size = labels_HW.shape
    wanted_HW = render(edited, size).segmentation.numpy()
    before_HW = render(source, size).segmentation.numpy()
    changed = {solid.pair for solid in set(source.solids) ^ set(edited.solids)}
    wanted_pairs = {solid.pair for solid in edited.solids}
    found = {pair: centres(labels_HW, *pair) for pair in ((s, c) for s in SHAPES for c in COLOURS)}
    wanted = {pair: centres(wanted_HW, *pair) for pair in found}

    done = all(len(found[pair]) == len(wanted[pair]) for pair in changed)
    if done and (gone := set(source.solids) - set(edited.solids)) and (new := set(edited.solids) - set(source.solids)):
        if {solid.pair for solid in gone} == {solid.pair for solid in new}:
            (pair,) = {solid.pair for solid in new}
            done = _moved(found[pair], centres(before_HW, *pair), wanted[pair])
        else:
            done = all(_same_places(found[solid.pair], wanted[solid.pair]) for solid in new)
    untouched = all(_same_places(found[pair], wanted[pair]) for pair in wanted_pairs - changed)
    untouched &= not any(found[pair] for pair in found.keys() - wanted_pairs - changed)
    background = background_of(image_CHW, labels_HW == 0, edited) == edited.background
    if source.background == edited.background:
        untouched &= background
    else:
        done &= background
    return {"done": bool(done), "untouched": bool(untouched)}


def background_of(image_CHW: torch.Tensor, is_background_HW: np.ndarray, scene: "Scene") -> str | None:
    """The background of `BACKGROUNDS` that a picture's own is nearest to, in squared difference of colours.

    None where nothing of it is to be seen.
    """
    renders = render_batch([replace(scene, background=name) for name in BACKGROUNDS], tuple(image_CHW.shape[1:]))
    mask = torch.from_numpy(is_background_HW)[None, None].float()
    mask = torch.nn.functional.interpolate(mask, image_CHW.shape[1:])[0, 0].bool() & (renders.segmentation[0] == 0)
    if not mask.any():
        return None
    difference = (renders.image.float() / 255 - image_CHW.cpu().float()).square().mean(1)
    return BACKGROUNDS[int(difference[:, mask].mean(1).argmin())]


def _same_places(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> bool:
    """Whether each place has a solid near it, and there are no more of them."""
    near = all(any(math.dist(place, other) < _NEAR for other in found) for place in wanted)
    return near and len(found) == len(wanted)


def _moved(found: list[tuple[float, float]], old: list[tuple[float, float]], new: list[tuple[float, float]]) -> bool:
    """Whether one solid has gone some way in the direction of its new place, and not much aside."""
    if not found or not old or not new:
        return False
    along = np.subtract(new[0], old[0]) / math.dist(new[0], old[0])
    step = np.subtract(found[0], old[0])
    forward = float(step @ along)
    return forward > _MOVED and float(np.linalg.norm(step - forward * along)) < _NEAR
