"""Trains the autoencoder of zoo/mini-sd: AutoencoderKL, 64 x 64 x 3 to 16 x 16 x 4.

    accelerate launch zoo/train_mini_sd_vae.py                                       # 2 CPU cores: 14 minutes
    accelerate launch zoo/train_mini_sd_vae.py --steps 20000 --batch_size 256        # GPU
    accelerate launch zoo/train_mini_sd_vae.py --start zoo/mini-sd/vae --name mini-sd-decoder    # the decoder alone

`zoo/train_mini_sd.py` goes on from the result. With `--start` the encoder stays as it is, and so do the latents that
a denoiser has been trained on; the better decoder is written back to where it came from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from trl import TrlParser

from data.scenes import Scene
from zoo.training import RUNS, Run, fit, parameter_count, pictures, scene_batches, write_log


@dataclass
class VaeRun(Run):
    name: str = "mini-sd-vae"
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.998


class Reconstruction(nn.Module):
    """An autoencoder whose forward is its loss: squared and absolute error, and a whisper of KL."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = self.vae.encode(x_BCHW).latent_dist
        y_BCHW = self.vae.decode(posterior.sample()).sample.float()
        mse, kl = F.mse_loss(y_BCHW, x_BCHW), posterior.kl().mean() / x_BCHW[0].numel()
        return {"loss": mse + 0.05 * F.l1_loss(y_BCHW, x_BCHW) + 1e-5 * kl, "mse": mse, "kl": kl}


def build_vae(latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
    )


def main() -> None:
    (run,) = TrlParser((VaeRun,)).parse_args_and_config()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(run.start, dtype=torch.float32) if run.start else build_vae()
    if run.start:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    network = Reconstruction(vae).to(memory_format=torch.channels_last)

    def loss(network, step, scenes):
        return network(pictures(scenes, 64, next(network.parameters()).device))

    _, log = fit(network, run, loss, lambda first, device: scene_batches(run, first, device))
    vae.to(memory_format=torch.contiguous_format)
    if run.start:
        vae.to(torch.bfloat16).save_pretrained(run.start)
        return
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae), 5))
    folder = RUNS / run.name
    vae.save_pretrained(folder / "vae")
    write_log(folder, run, log, parameters=parameter_count(vae))


@torch.no_grad()
def latent_std(vae: AutoencoderKL) -> float:
    """Standard deviation of the latents of 512 training scenes."""
    x_BCHW = pictures([Scene.random(i) for i in range(512)], 64, vae.device)
    return float(torch.cat([vae.encode(x).latent_dist.mode() for x in x_BCHW.split(32)]).std())


if __name__ == "__main__":
    main()
