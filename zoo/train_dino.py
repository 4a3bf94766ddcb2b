"""Trains zoo/dino: a vision transformer of timm by self-distillation, without any label (arXiv 2104.14294).

    accelerate launch zoo/train_dino.py                                        # 2 CPU cores: 15 minutes
    accelerate launch zoo/train_dino.py --steps 30000 --batch_size 512               # GPU

Two large crops of 64 px and four small ones of 32 px of each picture; the teacher sees the large ones. A picture is
rendered twice, with another texture of the background, so that a match must come from what is in the scene.
"""

import copy
import sys
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

from data.scenes import Scene, render_batch
from zoo.training import ZOO, Run, fit, parameter_count, scene_batches, write_log

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


class Dino(nn.Module):
    """The transformer, and the projection onto prototypes that training alone needs."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **MODEL_ARGS)
        width = MODEL_ARGS["embed_dim"]
        self.project = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 128))
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(128, PROTOTYPES, bias=False))

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        """Logits of all crops, one size after the other, float32."""
        features = torch.cat([self.vit(x) for x in crops])
        return self.prototypes(F.normalize(self.project(features), dim=-1)).float()


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


def main() -> None:
    (run,) = TrlParser((DinoRun,)).parse_args_and_config()
    torch.manual_seed(0)
    student = Dino()
    teacher = copy.deepcopy(student).requires_grad_(False)
    centre = torch.zeros(PROTOTYPES)

    def views(scenes: list[Scene], device: torch.device) -> list[torch.Tensor]:
        other = [replace(scene, texture=scene.texture ^ 0x5A5A5A) for scene in scenes]
        return [render_batch(s, 64, device).image.float() / 127.5 - 1 for s in (scenes, other)]

    def loss(student: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        nonlocal centre
        device = next(student.parameters()).device
        teacher.to(device)
        pictures = views(scenes, device)
        large = torch.cat([crop(x, 64, (0.5, 1.0)) for x in pictures])
        small = torch.cat([crop(pictures[i % 2], 32, (0.12, 0.4)) for i in range(run.local_crops)])
        centre = centre.to(device)
        with torch.no_grad():
            target = teacher([large])
            temperature = 0.04 + 0.02 * min(step / (0.3 * run.steps), 1.0)
            p_VBK = ((target - centre) / temperature).softmax(-1).reshape(2, len(scenes), -1)
            centre = 0.9 * centre + 0.1 * target.mean(0)
        log_q_VBK = (student([large, small]) / 0.1).log_softmax(-1).reshape(2 + run.local_crops, len(scenes), -1)
        terms = [-(p_VBK[t] * log_q_VBK[s]).sum(-1).mean() for t in range(2) for s in range(len(log_q_VBK)) if s != t]
        entropy = -(p_VBK * (p_VBK + 1e-8).log()).sum(-1).mean()
        return {"loss": torch.stack(terms).mean(), "teacher_entropy": entropy}

    @torch.no_grad()
    def follow(step: int) -> None:
        momentum = 0.99 + 0.009 * min(step / run.steps, 1.0)
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.lerp_(new.detach().to(old.device), 1 - momentum)

    _, log = fit(
        student, run, loss, lambda first, device: scene_batches(run, first, device, all_pairs=True), after_step=follow
    )
    vit, folder = student.vit.to("cpu", torch.bfloat16), ZOO / "dino"
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    vit.pretrained_cfg.update(config, interpolation="bicubic", crop_mode="center", num_classes=0)
    save_for_hf(vit, folder, model_args=MODEL_ARGS, safe_serialization=True)
    write_log(folder, log, parameters=parameter_count(vit))


if __name__ == "__main__":
    main()
