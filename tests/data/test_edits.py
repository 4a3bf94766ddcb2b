import random

import pytest
import torch

from data.scenes import EDITS, Scene, caption, check, edit, numbered_edit, render

SCENES = [Scene.random(i, split) for split in ("train", "test") for i in range(150)]


def edits_of(kind):
    for i, scene in enumerate(SCENES):
        try:
            yield scene, *edit(scene, random.Random(i), kind)
        except ValueError:
            continue


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_it_says(kind):
    count = 0
    for scene, instruction, edited in edits_of(kind):
        count += 1
        assert edited != scene and edited.split == scene.split
        kept = set(scene.solids) & set(edited.solids)
        if kind == "background":
            assert edited.background != scene.background and edited.solids == scene.solids
            continue
        assert edited.background == scene.background and edited.texture == scene.texture
        gone, new = set(scene.solids) - kept, set(edited.solids) - kept
        assert (len(gone) > 0, len(new) > 0) == {
            "add": (False, True),
            "remove": (True, False),
        }.get(kind, (True, True))
        for solid in gone:
            assert solid.colour in instruction and solid.shape in instruction
        if kind in ("recolour", "replace", "add"):
            assert all(solid.colour in instruction for solid in new)
    assert count > 40


def test_edited_scenes_can_still_be_checked():
    for i, scene in enumerate(SCENES[:120]):
        _, edited = edit(scene, random.Random(i))
        claims = caption(edited, random.Random(i))
        assert all(check(render(edited, 64).segmentation, claims).values()), claims


def test_what_is_not_edited_stays_to_the_pixel():
    scene, _, edited = next(e for e in edits_of("recolour") if len(e[0].solids) == 1)
    before, after = render(scene, 64), render(edited, 64)
    assert torch.equal(before.depth, after.depth)
    outside = before.segmentation == 0
    far = ~torch.nn.functional.max_pool2d((~outside)[None].float(), 5, 1, 2)[0].bool()
    assert torch.equal(before.image[far], after.image[far])


def test_same_state_same_edit():
    assert edit(SCENES[0], random.Random(5)) == edit(SCENES[0], random.Random(5))


def test_bad_input():
    with pytest.raises(ValueError, match="'paint'"):
        edit(SCENES[0], random.Random(0), "paint")
    alone = next(s for s in SCENES if len(s.solids) == 1)
    with pytest.raises(ValueError, match="No remove"):
        edit(alone, random.Random(0), "remove")


def test_every_test_scene_has_an_edit():
    """Some need more than 60 draws to find one that stays in their split."""
    for number in range(500):
        instruction, before, after = numbered_edit(number, "test")
        assert instruction and after != before and after.split == "test"
