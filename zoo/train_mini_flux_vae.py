"""Trains the autoencoder of zoo/mini-flux: AutoencoderKL, H x W x 3 to H/4 x W/4 x 8, at 64 and at 128 px.

    accelerate launch zoo/train_mini_flux_vae.py                                     # 2 CPU cores
    accelerate launch zoo/train_mini_flux_vae.py --steps 6000 --batch_size 128 --minutes 4       # GPU
    accelerate launch zoo/train_mini_flux_vae.py --start zoo/mini-flux/vae --name mini-flux-decoder  # decoder alone

`zoo/train_mini_flux.py` goes on from the result. With `--start` the encoder stays as it is, and so do the latents that
a transformer has been trained on; the better decoder is written back to where it came from.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import AutoencoderKL
from trl import TrlParser

from data.scenes import Scene
from zoo.mini_flux import LARGE, LATENT_CHANNELS, SMALL
from zoo.train_mini_sd_vae import Reconstruction
from zoo.training import RUNS, Run, fit, parameter_count, pictures, scene_batches, write_log


@dataclass
class VaeRun(Run):
    name: str = "mini-flux-vae"
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.998
    large_every: int = field(default=3, metadata={"help": "every n-th batch is at 128 px, a quarter as many pictures"})


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=LARGE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def batch_pictures(run: VaeRun, step: int, scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """x_BCHW in [-1, 1] of step number `step`: small, or every n-th time large and fewer."""
    if (step + 1) % run.large_every:
        return pictures(scenes, SMALL, device)
    return pictures(scenes[: max(1, len(scenes) // 4)], LARGE, device)


def main() -> None:
    (run,) = TrlParser((VaeRun,)).parse_args_and_config()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(run.start, dtype=torch.float32) if run.start else build_vae()
    if run.start:
        vae.encoder.requires_grad_(False)
    network = Reconstruction(vae).to(memory_format=torch.channels_last)

    def loss(network, step, scenes):
        return network(batch_pictures(run, step, scenes, next(network.parameters()).device))

    _, log = fit(network, run, loss, lambda first, device: scene_batches(run, first, device))
    vae.to(memory_format=torch.contiguous_format)
    if run.start:
        vae.to(torch.bfloat16).save_pretrained(run.start)
        return
    mean, std = latent_moments(vae)
    vae.register_to_config(shift_factor=round(mean, 5), scaling_factor=round(1 / std, 5))
    folder = RUNS / run.name
    vae.save_pretrained(folder / "vae")
    write_log(folder, log, parameters=parameter_count(vae))


@torch.no_grad()
def latent_moments(vae: AutoencoderKL) -> tuple[float, float]:
    """Mean and standard deviation of the latents of 512 training scenes at 64 px."""
    x_BCHW = pictures([Scene.random(i) for i in range(512)], SMALL, vae.device)
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in x_BCHW.split(32)])
    return float(latents.mean()), float(latents.std())


if __name__ == "__main__":
    main()
