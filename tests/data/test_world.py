import math

import pytest

from data.scenes import BACKGROUNDS, COLOURS, FINISHES, HELD_OUT_PAIRS, SHAPES, SIZES, SPLITS, Scene, split_of


def test_a_scene_is_a_function_of_its_seed():
    assert Scene.random(7, "test") == Scene.random(7, "test")
    assert Scene.random(7, "test") != Scene.random(8, "test")


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'dev'"):
        Scene.random(0, "dev")


def test_splits_share_no_combination():
    combinations = {
        split: {
            (s.background, tuple(sorted(x.pair for x in s.solids)))
            for s in (Scene.random(i, split) for i in range(600))
        }
        for split in SPLITS
    }
    assert not combinations["train"] & combinations["validation"]
    assert not combinations["train"] & combinations["test"]
    assert not combinations["validation"] & combinations["test"]


def test_held_out_pairs_never_train_and_are_tested():
    def pairs(split):
        return {solid.pair for i in range(1500) for solid in Scene.random(i, split).solids}

    assert not pairs("train") & HELD_OUT_PAIRS
    assert pairs("test") >= HELD_OUT_PAIRS
    assert len(pairs("train")) == len(SHAPES) * len(COLOURS) - len(HELD_OUT_PAIRS)


def test_held_out_pairs_leave_every_shape_and_most_colours_in_training():
    assert {shape for shape, _ in HELD_OUT_PAIRS} == set(SHAPES)
    assert len({colour for _, colour in HELD_OUT_PAIRS}) == len(HELD_OUT_PAIRS)


def test_everything_occurs():
    scenes = [Scene.random(i) for i in range(500)]
    solids = [solid for scene in scenes for solid in scene.solids]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {solid.size for solid in solids} == set(SIZES)
    assert {solid.finish for solid in solids} == set(FINISHES)
    assert {len(scene.solids) for scene in scenes} == {1, 2, 3, 4}


def test_solids_stay_inside_and_equal_ones_apart():
    for scene in (Scene.random(i) for i in range(300)):
        for i, a in enumerate(scene.solids):
            assert a.radius < a.x < 1 - a.radius and a.radius < a.y < 1 - a.radius
            for b in scene.solids[:i]:
                reach = a.radius + b.radius
                assert math.dist((a.x, a.y), (b.x, b.y)) >= (1.1 if a.pair == b.pair else 0.8) * reach
                assert b.y <= a.y  # farthest first


def test_a_split_does_not_depend_on_the_order_of_solids():
    pairs = [("ball", "red"), ("star", "blue")]
    assert split_of("sand", pairs) == split_of("sand", pairs[::-1])
