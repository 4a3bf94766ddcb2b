from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.scenes import BACKGROUNDS, NUM_CLASSES, Scene, render, render_batch

SCENES = [Scene.random(i) for i in range(48)]


def psnr(a, b):
    return float(-10 * torch.log10((a - b).square().mean()))


def test_shapes_and_types():
    image, depth, segmentation = render(SCENES[0], (48, 80))
    assert image.shape == (48, 80, 3) and image.dtype == torch.uint8
    assert depth.shape == (48, 80) and depth.dtype == torch.float32
    assert segmentation.shape == (48, 80) and segmentation.dtype == torch.int64


def test_a_batch_is_its_members():
    batch = render_batch(SCENES[:5], 64)
    for i, scene in enumerate(SCENES[:5]):
        alone = render(scene, 64)
        assert torch.equal(batch.image[i].permute(1, 2, 0), alone.image)
        assert torch.equal(batch.depth[i], alone.depth)
        assert torch.equal(batch.segmentation[i], alone.segmentation)


def test_one_scene_is_one_picture_at_every_size():
    small = render_batch(SCENES, 64)
    large = render_batch(SCENES, 512)
    shrunk = F.avg_pool2d(large.image.float(), 8)
    for a, b in zip(small.image, shrunk, strict=True):
        assert psnr(a / 255.0, b / 255.0) > 30
    same_class = small.segmentation == large.segmentation[:, 4::8, 4::8]
    assert same_class.float().mean() > 0.99


def test_large_pictures_show_texture_that_small_ones_cannot():
    for background in ("brick", "grass", "sand"):
        scenes = [replace(scene, background=background, solids=()) for scene in SCENES[:4]]
        large = render_batch(scenes, 512).image.float() / 255
        blurred = F.interpolate(F.avg_pool2d(large, 8), scale_factor=8, mode="bilinear")
        assert (large - blurred).std() > 0.01, background


def test_a_wide_picture_holds_the_square_one():
    square, wide = render(SCENES[3], 64), render(SCENES[3], (64, 128))
    difference = (wide.image[:, 32:96].int() - square.image.int()).abs()
    assert difference.max() <= 1
    assert torch.equal(wide.segmentation[:, 32:96], square.segmentation)


def test_segmentation_names_just_the_solids():
    for scene, segmentation in zip(SCENES, render_batch(SCENES, 64).segmentation, strict=True):
        assert set(segmentation.unique().tolist()) == {0} | {solid.class_id for solid in scene.solids}
        assert int(segmentation.max()) < NUM_CLASSES


def test_solids_are_nearer_than_the_background_and_lower_ones_nearer():
    scene = next(s for s in SCENES if len(s.solids) == 2 and s.solids[1].y - s.solids[0].y > 0.2)
    _, depth, segmentation = render(scene, 64)
    far, near = (depth[segmentation == solid.class_id].mean() for solid in scene.solids)
    assert depth[segmentation == 0].mean() < far < near <= 1
    assert depth.min() > 0


def test_every_background_looks_different():
    scenes = [replace(SCENES[0], background=background, solids=()) for background in BACKGROUNDS]
    means = render_batch(scenes, 32).image.float().mean((2, 3))
    assert torch.pdist(means).min() > 10


def test_edges_are_antialiased():
    scene = replace(SCENES[0], background="studio", solids=(replace(SCENES[0].solids[0], finish="plain"),))
    moved = replace(scene, solids=(replace(scene.solids[0], x=scene.solids[0].x + 0.25 / 64),))
    a, b = (render(s, 64).image.float() for s in (scene, moved))
    changed = (a - b).abs().amax(-1)
    assert 0 < changed.max() < 200  # a quarter of a pixel fades edges; it does not flip them


def test_tiny_size_is_refused():
    with pytest.raises(ValueError, match="8 x 8"):
        render(SCENES[0], 4)
