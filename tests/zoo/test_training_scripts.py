"""Every training script goes on from landed weights: the networks it builds are those that lie in the folder."""

import pytest
import torch

from data.scenes import NUM_CLASSES, Scene
from zoo import train_depth, train_dino, train_segmentation
from zoo.train_clip import build_clip, build_tokenizer
from zoo.training import ZOO, Run, load_start

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
    x = train_dino.views(SCENES * 8, torch.device("cpu"))[0]
    y = train_dino.recolour(x)
    assert y.shape == x.shape
    light, other = x.mean(1), y.mean(1)  # no order of the channels changes their mean
    torch.testing.assert_close(
        other / other.square().mean((1, 2), keepdim=True).sqrt(),
        light / light.square().mean((1, 2), keepdim=True).sqrt(),
    )
    changed = [not torch.allclose(a / a.norm(), b / b.norm(), atol=1e-5) for a, b in zip(x, y, strict=True)]
    assert 4 < sum(changed) < 28
