"""Trains zoo/depth: a U-Net of segmentation_models_pytorch that gives relative inverse depth, nearer is larger.

accelerate launch zoo/train_depth.py                                       # 2 CPU cores: 5 minutes
accelerate launch zoo/train_depth.py --steps 10000 --batch_size 256              # GPU
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from trl import TrlParser

from data.scenes import Scene, render_batch
from zoo.train_segmentation import augment, build_unet, prepare, save_unet
from zoo.training import ZOO, Run, fit, load_start, parameter_count, scene_batches, write_log

SIDE = 64


@dataclass
class DepthRun(Run):
    name: str = "depth"
    steps: int = 2000
    batch_size: int = 48
    learning_rate: float = 2e-3
    ema_decay: float = 0.998


def loss(network: nn.Module, step: int, scenes: list[Scene]) -> dict[str, torch.Tensor]:
    truth = render_batch(scenes, SIDE, next(network.parameters()).device)
    depth_BHW = network(augment(prepare(truth.image, SIDE)))[:, 0].float()
    error_BHW = depth_BHW.clamp(min=0.02).log() - truth.depth.log()
    off = (error_BHW.abs() < 0.22314).float().mean()  # log 1.25
    return {"loss": (depth_BHW - truth.depth).abs().mean() + 0.5 * error_BHW.abs().mean(), "delta": off}


def main() -> None:
    (run,) = TrlParser((DepthRun,)).parse_args_and_config()
    torch.manual_seed(0)
    network = load_start(build_unet(1), run).to(memory_format=torch.channels_last)
    network, log = fit(network, run, loss, lambda first, device: scene_batches(run, first, device, all_pairs=True))
    folder, parameters = ZOO / "depth", parameter_count(network)
    save_unet(network.to(memory_format=torch.contiguous_format), folder, SIDE)
    write_log(folder, run, log, parameters=parameters)


if __name__ == "__main__":
    main()
