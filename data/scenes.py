"""The miniature world: scenes of coloured, shaded solids, from a seed to a checked picture.

    scene = Scene.random(7, split="test")
    picture = render(scene, 64)                       # image, depth, segmentation
    words = caption(scene, random.Random(0))          # "a small dotted blue cone above a red ring on sand"
    check(picture.segmentation, words)                # {"object": True, "count": True, ...}
    instruction, edited = edit(scene, random.Random(0))

`data.world` says what a scene is, `data.rendering` draws it, `data.captions` puts it into words and checks them,
`data.edits` changes it.
"""

from data.captions import QUESTIONS, Caption, Phrase, caption, check, parse, vocabulary
from data.edit_check import check_edit
from data.edits import EDITS, edit, edit_vocabulary, numbered_edit
from data.rendering import Render, render, render_batch
from data.world import (
    BACKGROUNDS,
    COLOURS,
    FINISHES,
    HELD_OUT_PAIRS,
    NUM_CLASSES,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Solid,
    class_id,
    split_of,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "EDITS",
    "FINISHES",
    "HELD_OUT_PAIRS",
    "NUM_CLASSES",
    "QUESTIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Caption",
    "Phrase",
    "Render",
    "Scene",
    "Solid",
    "caption",
    "check",
    "check_edit",
    "class_id",
    "edit",
    "edit_vocabulary",
    "numbered_edit",
    "parse",
    "render",
    "render_batch",
    "split_of",
    "vocabulary",
]
