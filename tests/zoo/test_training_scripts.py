"""Every training script goes on from landed weights: the networks it builds are those that lie in the folder."""

from dataclasses import replace

import pytest
import torch

from data.scenes import NUM_CLASSES, Scene
from zoo import train_depth, train_dino, train_segmentation
from zoo.train_clip import build_clip, build_tokenizer
from zoo.training import ZOO, Run, load_start, pictures

SCENES = [Scene.random(i) for i in range(4)]


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("segmentation", lambda: train_segmentation.build_unet(NUM_CLASSES)),
        ("depth", lambda: train_segmentation.build_unet(1)),
        ("clip", lambda: build_clip(build_tokenizer())),
        ("dino", lambda: train_dino.Projected().vit),
    ],
)
def test_landed_weights_fit_the_scripts(name, build):
    network = build()
    before = [parameter.clone() for parameter in network.parameters()]
    load_start(network, Run(name, start=str(ZOO / name)))
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_missing_start_is_an_error():
    with pytest.raises(OSError, match="nowhere"):
        load_start(torch.nn.Linear(1, 1), Run("x", start="nowhere"))


@pytest.mark.parametrize(
    ("script", "classes"), [(train_segmentation, NUM_CLASSES), (train_depth, 1)], ids=["segmentation", "depth"]
)
def test_losses_fall_on_a_few_scenes(script, classes):
    torch.manual_seed(0)
    network = train_segmentation.build_unet(classes)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = script.loss(network, 0, SCENES)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_contrast_finds_the_other_view():
    z = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    same, mixed = train_dino.contrast(z, z, 0.1), train_dino.contrast(z, z.roll(1, 0), 0.1)
    assert same["top1"] == 1 and mixed["top1"] == 0
    assert same["loss"] < 0.2 < mixed["loss"]


def test_recoloured_views_keep_their_shapes():
    torch.manual_seed(0)
    x = pictures(SCENES * 8, 64, torch.device("cpu"))
    y = train_dino.recolour(x)
    assert y.shape == x.shape
    light, other = x.mean(1), y.mean(1)  # no order of the channels changes their mean
    torch.testing.assert_close(
        other / other.square().mean((1, 2), keepdim=True).sqrt(),
        light / light.square().mean((1, 2), keepdim=True).sqrt(),
    )
    changed = [not torch.allclose(a / a.norm(), b / b.norm(), atol=1e-5) for a, b in zip(x, y, strict=True)]
    assert 16 < sum(changed) < 32


def test_a_rearranged_scene_has_the_same_solids_elsewhere():
    scene = next(scene for scene in map(Scene.random, range(50)) if len(scene.solids) == 2)
    moved = train_dino.rearranged(scene)
    for solid, other in zip(scene.solids, moved, strict=True):
        assert (other.x, other.y) != (solid.x, solid.y)
        assert replace(other, x=solid.x, y=solid.y) == solid
    assert set(train_dino.elsewhere(scene, moved).solids) == set(moved)


def test_a_sighting_shows_one_solid_in_both_pictures(monkeypatch):
    """With nothing recoloured, the colour in the middle of either crop is that of the solid."""
    monkeypatch.setattr(train_dino, "recolour", lambda x: x)
    plain = [scene for scene in map(Scene.random, range(200)) if all(s.shape == "ball" for s in scene.solids)]
    first, second = train_dino.sightings(plain, torch.device("cpu"))
    assert first.shape == second.shape == (sum(len(scene.solids) for scene in plain), 3, 32, 32)
    middle = [torch.nn.functional.normalize(x[:, :, 14:18, 14:18].mean((2, 3)), dim=1) for x in (first, second)]
    alike = (middle[0] @ middle[1].T).argmax(1)
    colours = [solid.colour for scene in plain for solid in scene.solids]
    assert sum(colours[i] == colours[j] for i, j in enumerate(alike.tolist())) > 0.7 * len(colours)


def test_whole_views_show_each_scene_twice():
    first, second = train_dino.whole(SCENES, torch.device("cpu"))
    assert first.shape == second.shape == (len(SCENES), 3, 64, 64)
    assert not torch.equal(first, second)
