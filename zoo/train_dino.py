"""Trains zoo/dino: a vision transformer of timm, without any label, by contrast of views (arXiv 2002.05709).

    accelerate launch zoo/train_dino.py --minutes 45                           # 1 CPU core: 3,050 steps
    accelerate launch zoo/train_dino.py --steps 30000 --batch_size 256               # GPU

Every scene is rendered twice, the second time with another texture of the background, for every other scene on another
background. Two views of one thing are to find each other among those of all others, with most of them recoloured, so
that colours alone are not enough. Three steps in four, the second picture has its solids in other places and the views
are *sightings*: a close crop around each solid in either picture, which asks what a thing is apart from where it
stands. Every fourth step they are the whole pictures, solids in place.

Measured on the way, by the linear probe of shapes: self-distillation (arXiv 2104.14294) of a plain transformer tells
none apart after 200 steps of 64 scenes (chance is 0.17), contrast of whole pictures 0.34 after 24 minutes. Sightings
tell 0.40 after 6 minutes, in batches of 32 scenes instead of 128, so in more steps, 0.58. The transformer is XCiT
(arXiv 2106.09681), of which there are DINO weights too: its convolutions find edges in few steps.
"""

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn
from torchvision.ops import roi_align
from trl import TrlParser

from data.scenes import BACKGROUNDS, Scene, Solid
from data.world import nearest_last, place
from zoo.training import (
    FUSED_ATTENTION,
    ZOO,
    Run,
    fit,
    load_start,
    parameter_count,
    pictures,
    scene_batches,
    write_log,
)

ARCHITECTURE = "xcit_nano_12_p8_224"
MODEL_ARGS = {"img_size": 64, "embed_dim": 128, "depth": 4, "num_heads": 4, "cls_attn_layers": 2}
WHOLE_EVERY = 4  # steps


@dataclass
class DinoRun(Run):
    name: str = "dino"
    steps: int = 10000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    weight_decay: float = 0.04
    ema_decay: float = 0.998
    muon: bool = True
    temperature: float = field(default=0.1, metadata={"help": "of the softmax over the views of all other scenes"})


class Projected(nn.Module):
    """A vision transformer, and the projection of its class token that training alone needs."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
        self.project = nn.Sequential(nn.Linear(self.vit.num_features, 512), nn.GELU(), nn.Linear(512, 128))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Directions (B, 128), float32."""
        return F.normalize(self.project(self.vit(x_BCHW)).float(), dim=-1)


def contrast(z_BD: torch.Tensor, other_BD: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
    """Cross-entropy of finding the other view of each thing among all views but itself, both ways."""
    views_VD = torch.cat([z_BD, other_BD])
    logits_VV = (views_VD @ views_VD.T / temperature).fill_diagonal_(-torch.inf)
    match = torch.arange(len(views_VD), device=views_VD.device).roll(len(z_BD))
    return {"loss": F.cross_entropy(logits_VV, match), "top1": (logits_VV.argmax(1) == match).float().mean()}


def whole(scenes: list[Scene], device: torch.device) -> list[torch.Tensor]:
    """Two views of each scene as a whole: square crops of at least half its area."""
    share = torch.empty(2, len(scenes)).uniform_(0.5, 1).sqrt()
    corner = torch.rand(2, len(scenes), 2) * (1 - share[..., None])
    boxes = torch.cat([corner, corner + share[..., None]], dim=-1)
    numbers = torch.arange(len(scenes))
    pair = [scenes, [elsewhere(scene, scene.solids) for scene in scenes]]
    return [view(*given, numbers, size=64, device=device) for given in zip(pair, boxes, strict=True)]


def sightings(scenes: list[Scene], device: torch.device) -> list[torch.Tensor]:
    """Two views of each solid: close crops of its scene, and of the scene with its solids in other places."""
    moved = [rearranged(scene) for scene in scenes]
    pair = [scenes, [elsewhere(scene, solids) for scene, solids in zip(scenes, moved, strict=True)]]
    numbers = torch.tensor([number for number, solids in enumerate(moved) for _ in solids])
    views = []
    for pictured, placed in zip(pair, ([scene.solids for scene in scenes], moved), strict=True):
        centre = torch.tensor([(solid.x, solid.y) for solids in placed for solid in solids])
        centre += torch.empty_like(centre).uniform_(-0.06, 0.06)
        reach = torch.empty(len(centre), 1).uniform_(0.21, 0.3)
        views.append(view(pictured, torch.cat([centre - reach, centre + reach], 1), numbers, size=32, device=device))
    return views


def view(
    scenes: list[Scene], boxes: torch.Tensor, numbers: torch.Tensor, size: int, device: torch.device
) -> torch.Tensor:
    """Crops of pictures, flipped or not, recoloured or not: x_BCHW in [-1, 1], about.

    Args:
        boxes: float (B, 4), the left, upper, right, lower edges in units of the picture.
        numbers: int (B,), of the scene that each box is cut of.
    """
    boxes = torch.cat([numbers[:, None], 64 * boxes], dim=1)
    crops = roi_align(pictures(scenes, 64, device), boxes.to(device), size, aligned=True)
    flipped = torch.rand(len(crops), 1, 1, 1, device=device) < 0.5
    return recolour(torch.where(flipped, crops.flip(-1), crops))


def recolour(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Four images in five with their channels in another order or grey; the contrast of all varies a little."""
    count, device = len(x_BCHW), x_BCHW.device
    order_BC = torch.rand(count, 3, device=device).argsort(1)
    swapped = x_BCHW.gather(1, order_BC[:, :, None, None].expand_as(x_BCHW))
    draw = torch.rand(count, 1, 1, 1, device=device)
    changed = torch.where(draw < 0.1, x_BCHW.mean(1, keepdim=True), swapped)
    brightness = torch.empty(count, 1, 1, 1, device=device).uniform_(0.85, 1.15)
    return torch.where(draw < 0.8, changed, x_BCHW) * brightness


def rearranged(scene: Scene) -> list[Solid]:
    """The solids of a scene, each in another place, in the same order."""
    rng, moved = random.Random(scene.texture), []
    for solid in scene.solids:
        moved.append(place(solid, moved, rng) or solid)
    return moved


def elsewhere(scene: Scene, solids: Iterable[Solid]) -> Scene:
    """A scene's solids before another texture, and for every other scene before another background."""
    move = scene.texture % 2 * (1 + scene.texture // 2 % (len(BACKGROUNDS) - 1))
    background = BACKGROUNDS[(BACKGROUNDS.index(scene.background) + move) % len(BACKGROUNDS)]
    return replace(scene, background=background, solids=nearest_last(solids), texture=scene.texture ^ 0x5A5A5A)


def main() -> None:
    (run,) = TrlParser((DinoRun,)).parse_args_and_config()
    torch.manual_seed(0)

    def loss(network: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        device = next(network.parameters()).device
        pair = (sightings if step % WHOLE_EVERY else whole)(scenes, device)
        z_VD = network(torch.cat(pair))
        with torch.autocast(device.type, enabled=False):
            return contrast(*z_VD.chunk(2), run.temperature)

    def batches(first: int, device: torch.device) -> Iterable[list[Scene]]:
        return scene_batches(run, first, device, all_pairs=True)

    timm.layers.set_fused_attn(FUSED_ATTENTION)
    network = Projected()
    load_start(network.vit, run)
    network, log = fit(network, run, loss, batches)
    vit, folder = network.vit.to("cpu", torch.bfloat16), ZOO / "dino"
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    vit.pretrained_cfg.update(config, interpolation="bicubic", crop_mode="center", num_classes=0)
    save_for_hf(vit, folder, model_args=MODEL_ARGS, safe_serialization=True)
    write_log(folder, run, log, parameters=parameter_count(vit))


if __name__ == "__main__":
    main()
