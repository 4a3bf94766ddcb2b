import random
from dataclasses import replace

import pytest
import torch

from data.scenes import (
    QUESTIONS,
    SPLITS,
    Caption,
    Phrase,
    Scene,
    caption,
    check,
    class_id,
    parse,
    render_batch,
    vocabulary,
)

BLANK = torch.zeros(64, 64, dtype=torch.int64)


def captioned(count, split):
    scenes = [Scene.random(i, split) for i in range(count)]
    return scenes, [caption(scene, random.Random(i)) for i, scene in enumerate(scenes)]


def square(map_HW, shape, colour, x, y, side=12):
    map_HW = map_HW.clone()
    map_HW[y : y + side, x : x + side] = class_id(shape, colour)
    return map_HW


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [64, 96])
def test_renders_answer_every_question(split, size):
    scenes, claims = captioned(400, split)
    maps = render_batch(scenes, size).segmentation
    wrong = [(c.text, check(m, c)) for m, c in zip(maps, claims, strict=True) if not all(check(m, c).values())]
    assert not wrong


def test_every_question_is_asked():
    scenes, claims = captioned(200, "test")
    maps = render_batch(scenes, 64).segmentation
    asked = {question for m, c in zip(maps, claims, strict=True) for question in check(m, c)}
    assert asked == set(QUESTIONS)


def test_other_scenes_rarely_answer():
    scenes, claims = captioned(200, "test")
    maps = render_batch(scenes[1:] + scenes[:1], 64).segmentation
    whole = [all(check(m, c).values()) for m, c in zip(maps, claims, strict=True)]
    assert sum(whole) < 10


def test_a_sentence_can_be_read_back():
    for claims in (c for split in SPLITS for c in captioned(500, split)[1]):
        assert parse(claims.text) == claims


def test_captions_are_no_template_and_keep_to_the_vocabulary():
    scene = Scene.random(3, "test")
    texts = {caption(scene, random.Random(i)).text for i in range(50)}
    assert len(texts) > 20
    words = {word for text in texts for word in text.replace(",", "").split()}
    assert words <= set(vocabulary())


def test_wrong_count():
    two = square(square(BLANK, "cube", "blue", 2, 2), "cube", "blue", 40, 40)
    assert check(two, "two blue cubes") == {"object": True, "count": True, "colour": True}
    assert check(two, "three blue cubes")["count"] is False
    assert check(two, "a blue cube")["count"] is False


def test_wrong_colour():
    cube = square(BLANK, "cube", "blue", 2, 2)
    assert check(cube, "a red cube") == {"object": True, "count": False, "colour": False}


def test_swapped_colours_fail_the_binding_only():
    swapped = square(square(BLANK, "cube", "blue", 2, 2), "ball", "red", 40, 2)
    answers = check(swapped, "a red cube and a blue ball")
    assert answers == {"object": True, "count": False, "colour_binding": False}


@pytest.mark.parametrize(
    ("relation", "holds"), [("left of", True), ("right of", False), ("above", False), ("below", False)]
)
def test_position(relation, holds):
    pair = square(square(BLANK, "cube", "blue", 2, 20), "ball", "red", 40, 20)
    assert check(pair, f"a blue cube {relation} a red ball")["position"] is holds


def test_position_needs_both():
    cube = square(BLANK, "cube", "blue", 2, 20)
    answers = check(cube, "a blue cube left of a red ball")
    assert answers["object"] is False and answers["position"] is False


def test_specks_are_no_solids():
    speck = square(square(BLANK, "cube", "blue", 2, 2), "cube", "blue", 40, 40, side=3)
    assert check(speck, "a blue cube")["count"] is True


def test_size_of_the_map_does_not_matter():
    claims = Caption("", (Phrase("cube", "blue", 1),))
    small = square(BLANK, "cube", "blue", 2, 2)
    assert check(small, claims) == check(small.repeat_interleave(4, 0).repeat_interleave(4, 1), claims)


def test_colour_is_left_out_only_where_the_shape_says_enough():
    scene = Scene.random(0, "train")
    twins = replace(
        scene, solids=tuple(replace(scene.solids[0], colour=c, x=x) for c, x in (("red", 0.2), ("blue", 0.8)))
    )
    for i in range(200):
        assert all(phrase.colour for phrase in caption(twins, random.Random(i)).phrases)


def test_bad_input():
    with pytest.raises(ValueError, match="names none of"):
        parse("a photograph of a cat")
    with pytest.raises(ValueError, match=r"\(1, 64, 64\)"):
        check(BLANK[None], "a red ball")
