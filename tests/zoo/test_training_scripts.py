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


def test_the_teacher_follows_the_student_and_gets_no_gradient():
    torch.manual_seed(0)
    dino = train_dino.Dino(train_dino.Projected())
    dino(train_dino.views(SCENES, torch.device("cpu")), 2, 0.04)["loss"].backward()
    assert all(p.grad is None for p in dino.teacher.parameters())
    with torch.no_grad():
        for p in dino.student.parameters():
            p.add_(1)
    old = [p.clone() for p in dino.teacher.parameters()]
    dino.follow(0.9)
    for before, teacher, student in zip(old, dino.teacher.parameters(), dino.student.parameters(), strict=True):
        torch.testing.assert_close(teacher, before.lerp(student, 0.1))
