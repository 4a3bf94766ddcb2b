"""The checker of edits: yes to the truth of every kind, no to what only half of it is."""

import random
from dataclasses import replace

import pytest
import torch

from data.scenes import BACKGROUNDS, EDITS, Scene, check_edit, edit, numbered_edit, render

YES = {"done": True, "untouched": True}


def answer(shown, source, edited, size=64):
    picture = render(shown, size)
    return check_edit(picture.image.permute(2, 0, 1) / 255, picture.segmentation, source, edited)


def edits_of(kind, count):
    for i in range(count):
        source = Scene.random(i, "test")
        try:
            yield source, edit(source, random.Random(i), kind)[1]
        except ValueError:
            continue


@pytest.mark.parametrize("kind", EDITS)
def test_the_truth_is_right_and_the_source_is_not(kind):
    answers = [
        (answer(edited, source, edited), answer(source, source, edited)) for source, edited in edits_of(kind, 25)
    ]
    assert len(answers) > 6
    assert sum(after == YES for after, _ in answers) >= len(answers) - 1  # a covered solid may fall apart
    assert not any(before["done"] for _, before in answers)


def test_a_changed_rest_is_noticed():
    seen = set()
    for i in range(30):
        instruction, source, edited = numbered_edit(i, "test")
        if source.background == edited.background:
            elsewhere = replace(edited, background=next(b for b in BACKGROUNDS if b != edited.background))
            assert answer(elsewhere, source, edited) == {"done": True, "untouched": False}, instruction
            seen.add("background")
        changed = {solid.pair for solid in set(source.solids) ^ set(edited.solids)}
        lost = next((solid for solid in edited.solids if solid.pair not in changed), None)
        if lost:
            without = replace(edited, solids=tuple(solid for solid in edited.solids if solid != lost))
            assert not answer(without, source, edited)["untouched"], instruction
            seen.add("lost")
    assert seen == {"background", "lost"}


def test_a_move_must_go_the_right_way():
    source, edited = next((s, e) for s, e in edits_of("move", 100) if len(s.solids) == 1)
    (old,), (new,) = source.solids, edited.solids
    half = replace(old, x=(old.x + new.x) / 2, y=(old.y + new.y) / 2)
    back = replace(old, x=2 * old.x - half.x, y=2 * old.y - half.y)
    assert answer(replace(source, solids=(half,)), source, edited) == YES
    assert not answer(replace(source, solids=(back,)), source, edited)["done"]


def test_a_picture_of_no_background_is_on_none():
    source, edited = next((s, e) for s, e in edits_of("background", 30) if e.background == BACKGROUNDS[0])
    picture = render(edited, 64)
    hidden = torch.where(picture.segmentation == 0, -1, picture.segmentation)  # a class that no solid has
    assert not check_edit(picture.image.permute(2, 0, 1) / 255, hidden, source, edited)["done"]


def test_the_size_of_the_picture_does_not_matter():
    _, source, edited = numbered_edit(3, "test")
    assert answer(edited, source, edited, 64) == answer(edited, source, edited, 128) == YES
