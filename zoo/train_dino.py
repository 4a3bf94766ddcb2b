"""Trains zoo/dino: a vision transformer of timm, without any label, by contrast of views (arXiv 2002.05709).

    accelerate launch zoo/train_dino.py --minutes 24                           # 1 CPU core: 320 steps
    accelerate launch zoo/train_dino.py --steps 30000 --batch_size 512               # GPU

Two crops of every scene are to find each other among those of all others. The second shows it with another texture of
the background, for every other scene on another background, so that a match must come from what is in the scene; every
other crop has its colours changed, so that colours alone are not enough. Self-distillation (arXiv 2104.14294) told no
shapes apart after 200 steps of 64 scenes, where this begins to.
"""

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

from data.scenes import BACKGROUNDS, Scene
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

MODEL_ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 160, "depth": 5, "num_heads": 5, "dynamic_img_size": True}


@dataclass
class DinoRun(Run):
    name: str = "dino"
    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.04
    ema_decay: float = 0.998
    muon: bool = True
    temperature: float = field(default=0.1, metadata={"help": "of the softmax over the views of all other scenes"})


class Projected(nn.Module):
    """A vision transformer, and the projection of its class token that training alone needs."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **MODEL_ARGS)
        self.project = nn.Sequential(nn.Linear(MODEL_ARGS["embed_dim"], 512), nn.GELU(), nn.Linear(512, 128))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Directions (B, 128), float32."""
        return F.normalize(self.project(self.vit(x_BCHW)).float(), dim=-1)


def contrast(z_BD: torch.Tensor, other_BD: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
    """Cross-entropy of finding the other view of each scene among all views but itself, both ways."""
    views_VD = torch.cat([z_BD, other_BD])
    logits_VV = (views_VD @ views_VD.T / temperature).fill_diagonal_(-torch.inf)
    match = torch.arange(len(views_VD), device=views_VD.device).roll(len(z_BD))
    return {"loss": F.cross_entropy(logits_VV, match), "top1": (logits_VV.argmax(1) == match).float().mean()}


def crop(x_BCHW: torch.Tensor, share: tuple[float, float] = (0.4, 1.0)) -> torch.Tensor:
    """A random square crop of each image, its area within `share` of the picture, flipped or not."""
    count, side, device = len(x_BCHW), x_BCHW.shape[-1], x_BCHW.device
    edge = side * torch.empty(count, device=device).uniform_(*share).sqrt()
    corner = torch.rand(count, 2, device=device) * (side - edge)[:, None]
    boxes = torch.cat([torch.arange(count, device=device)[:, None], corner, corner + edge[:, None]], dim=1)
    crops = roi_align(x_BCHW, boxes, side, aligned=True)
    flipped = torch.rand(count, 1, 1, 1, device=device) < 0.5
    return torch.where(flipped, crops.flip(-1), crops)


def recolour(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Every other image with its channels in another order, some of them grey; the contrast of all varies a little."""
    count, device = len(x_BCHW), x_BCHW.device
    order_BC = torch.rand(count, 3, device=device).argsort(1)
    swapped = x_BCHW.gather(1, order_BC[:, :, None, None].expand_as(x_BCHW))
    draw = torch.rand(count, 1, 1, 1, device=device)
    changed = torch.where(draw < 0.1, x_BCHW.mean(1, keepdim=True), swapped)
    brightness = torch.empty(count, 1, 1, 1, device=device).uniform_(0.85, 1.15)
    return torch.where(draw < 0.5, changed, x_BCHW) * brightness


def views(scenes: list[Scene], device: torch.device) -> list[torch.Tensor]:
    """Each scene twice, x_BCHW in [-1, 1]: the second time with another texture, and every other scene elsewhere."""
    other = [replace(scene, texture=scene.texture ^ 0x5A5A5A, background=elsewhere(scene)) for scene in scenes]
    return [pictures(version, 64, device) for version in (scenes, other)]


def elsewhere(scene: Scene) -> str:
    move = scene.texture % 2 * (1 + scene.texture // 2 % (len(BACKGROUNDS) - 1))
    return BACKGROUNDS[(BACKGROUNDS.index(scene.background) + move) % len(BACKGROUNDS)]


def main() -> None:
    (run,) = TrlParser((DinoRun,)).parse_args_and_config()
    torch.manual_seed(0)

    def loss(network: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        device = next(network.parameters()).device
        z_VD = network(torch.cat([recolour(crop(x)) for x in views(scenes, device)]))
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
