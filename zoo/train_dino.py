"""Trains zoo/dino: a vision transformer of timm by self-distillation, without any label (arXiv 2104.14294).

    accelerate launch zoo/train_dino.py                                        # 2 CPU cores: 15 minutes
    accelerate launch zoo/train_dino.py --steps 30000 --batch_size 512               # GPU

Two large crops of 64 px and four small ones of 32 px of each picture; the teacher sees the large ones. A scene is
rendered twice, with another texture of the background, for every other scene even with another background, so that a
match must come from what is in the scene.
"""

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
PROTOTYPES = 1024


@dataclass
class DinoRun(Run):
    name: str = "dino"
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.04
    ema_decay: float = 0.996
    local_crops: int = 4


class Projected(nn.Module):
    """A vision transformer, and the projection onto prototypes that training alone needs."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **MODEL_ARGS)
        self.project = nn.Sequential(nn.Linear(MODEL_ARGS["embed_dim"], 512), nn.GELU(), nn.Linear(512, 128))
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(128, PROTOTYPES, bias=False))

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        """Logits (N, prototypes) of all crops, one size after the other, float32."""
        features = torch.cat([self.vit(x) for x in crops])
        return self.prototypes(F.normalize(self.project(features), dim=-1)).float()


class Dino(nn.Module):
    """Student, teacher and the running centre of the teacher's logits; forward is the loss on pairs of pictures."""

    def __init__(self, student: Projected):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(PROTOTYPES))

    def forward(self, pictures: list[torch.Tensor], local_crops: int, temperature: float) -> dict[str, torch.Tensor]:
        count = len(pictures[0])
        large = torch.cat([crop(x, 64, (0.5, 1.0)) for x in pictures])
        small = torch.cat([crop(pictures[i % 2], 32, (0.12, 0.4)) for i in range(local_crops)])
        with torch.no_grad():
            target = self.teacher([large])
            p_VBK = ((target - self.centre) / temperature).softmax(-1).unflatten(0, (2, count))
            self.centre.lerp_(target.mean(0), 0.1)
        log_q_VBK = (self.student([large, small]) / 0.1).log_softmax(-1).unflatten(0, (2 + local_crops, count))
        terms = [-(p_VBK[t] * log_q_VBK[s]).sum(-1).mean() for t in range(2) for s in range(2 + local_crops) if s != t]
        entropy = -(p_VBK * (p_VBK + 1e-8).log()).sum(-1).mean()
        return {"loss": torch.stack(terms).mean(), "teacher_entropy": entropy}

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Moves the teacher towards the student."""
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)


def crop(x_BCHW: torch.Tensor, side: int, share: tuple[float, float]) -> torch.Tensor:
    """A random square crop of each image, its area within `share` of the picture, flipped or not."""
    count, extent, device = len(x_BCHW), x_BCHW.shape[-1], x_BCHW.device
    edge = extent * torch.empty(count, device=device).uniform_(*share).sqrt()
    corner = torch.rand(count, 2, device=device) * (extent - edge)[:, None]
    boxes = torch.cat([torch.arange(count, device=device)[:, None], corner, corner + edge[:, None]], dim=1)
    crops = roi_align(x_BCHW, boxes, side, aligned=True)
    flipped = torch.rand(count, 1, 1, 1, device=device) < 0.5
    brightness = torch.empty(count, 1, 1, 1, device=device).uniform_(0.85, 1.15)
    return torch.where(flipped, crops.flip(-1), crops) * brightness


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

    def loss(dino: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        temperature = 0.04 + 0.02 * min(step / (0.3 * run.steps), 1.0)
        return dino(views(scenes, next(dino.parameters()).device), run.local_crops, temperature)

    def follow(dino: Dino, step: int) -> None:
        dino.follow(0.99 + 0.009 * min(step / run.steps, 1.0))

    def batches(first: int, device: torch.device) -> Iterable[list[Scene]]:
        return scene_batches(run, first, device, all_pairs=True)

    timm.layers.set_fused_attn(FUSED_ATTENTION)
    student = Projected()
    load_start(student.vit, run)
    dino, log = fit(Dino(student), run, loss, batches, follow)
    vit, folder = dino.student.vit.to("cpu", torch.bfloat16), ZOO / "dino"
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    vit.pretrained_cfg.update(config, interpolation="bicubic", crop_mode="center", num_classes=0)
    save_for_hf(vit, folder, model_args=MODEL_ARGS, safe_serialization=True)
    write_log(folder, log, parameters=parameter_count(vit))


if __name__ == "__main__":
    main()
