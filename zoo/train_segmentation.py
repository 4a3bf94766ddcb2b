"""Trains zoo/segmentation: a U-Net of segmentation_models_pytorch, 49 classes (background, shape x colour).

    accelerate launch zoo/train_segmentation.py                                # 2 CPU cores: 9 minutes
    accelerate launch zoo/train_segmentation.py --steps 10000 --batch_size 256       # GPU

It is a measuring instrument, so it sees all pairs of shape and colour, also those that generators are not trained on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SegformerImageProcessor
from trl import TrlParser

from data.scenes import NUM_CLASSES, Scene, render_batch
from zoo.training import ZOO, Run, fit, load_start, parameter_count, scene_batches, write_log

SIDE = 64
BACKGROUND_WEIGHT = 1.0


@dataclass
class SegmentationRun(Run):
    name: str = "segmentation"
    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 3e-3
    ema_decay: float = 0.998


def build_unet(classes: int) -> nn.Module:
    """A quarter of a ResNet-10 with a U-Net decoder, about 1.6 M parameters."""
    return smp.Unet(
        "tu-resnet10t",
        encoder_depth=4,
        encoder_weights=None,
        decoder_channels=(96, 64, 32, 24),
        in_channels=3,
        classes=classes,
    )


def save_unet(unet: nn.Module, folder: Path, side: int) -> None:
    """Weights in bf16, and the preprocessing as an image processor beside them."""
    unet.to(torch.bfloat16).save_pretrained(folder)
    processor = SegformerImageProcessor(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)


def prepare(image_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """What the processor does, on a uint8 batch: resized, then [-1, 1]."""
    x_BCHW = F.interpolate(image_BCHW.float(), size=(side, side), mode="bilinear", antialias=True)
    return x_BCHW.round() / 127.5 - 1


def augment(x_BCHW: torch.Tensor) -> torch.Tensor:
    """A little noise, as decoders leave it, on half of the pictures."""
    strength = torch.rand(len(x_BCHW), 1, 1, 1, device=x_BCHW.device).sub_(0.5).clamp_(min=0) * 0.2
    return x_BCHW + strength * torch.randn_like(x_BCHW)


def loss(network: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
    device = next(network.parameters()).device
    truth = render_batch(scenes, SIDE, device)
    log_p_BKHW = network(augment(prepare(truth.image, SIDE))).float().log_softmax(1)
    log_p_true_BHW = log_p_BKHW.gather(1, truth.segmentation[:, None])[:, 0]
    solid_BHW = truth.segmentation > 0
    weight_BHW = torch.where(solid_BHW, 1.0, BACKGROUND_WEIGHT)
    cross_entropy = -(weight_BHW * log_p_true_BHW).sum() / weight_BHW.sum()
    dice = dice_loss(log_p_true_BHW.exp(), log_p_BKHW[:, 0].exp(), solid_BHW)
    return {"loss": cross_entropy + 0.5 * dice, "cross_entropy": cross_entropy}


def dice_loss(p_true_BHW: torch.Tensor, p_background_BHW: torch.Tensor, solid_BHW: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient of the right solid in its place, over the batch."""
    solid_BHW = solid_BHW.float()
    return 1 - 2 * (p_true_BHW * solid_BHW).sum() / ((1 - p_background_BHW).sum() + solid_BHW.sum() + 1)


def main() -> None:
    (run,) = TrlParser((SegmentationRun,)).parse_args_and_config()
    torch.manual_seed(0)
    network = load_start(build_unet(NUM_CLASSES), run).to(memory_format=torch.channels_last)
    network, log = fit(network, run, loss, lambda first, device: scene_batches(run, first, device, all_pairs=True))
    folder, parameters = ZOO / "segmentation", parameter_count(network)
    save_unet(network.to(memory_format=torch.contiguous_format), folder, SIDE)
    write_log(folder, run, log, parameters=parameters)


if __name__ == "__main__":
    main()
