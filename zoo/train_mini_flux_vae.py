"""Trains the autoencoder of zoo/mini-flux: AutoencoderKL, H x W x 3 to H/4 x W/4 x 8, at 64 and at 128 px.

    accelerate launch zoo/train_mini_flux_vae.py                                     # 2 CPU cores
    accelerate launch zoo/train_mini_flux_vae.py --steps 6000 --batch_size 128 --minutes 4       # GPU
    accelerate launch zoo/train_mini_flux_vae.py --start zoo/mini-flux/vae --name mini-flux-decoder  # decoder alone

It begins as the autoencoder of zoo/mini-sd, whose four channels are the first four of its eight: that one knows the
world already, at 64 px. `zoo/train_mini_flux.py` goes on from the result. With `--start` the encoder stays as it is,
and so do the latents that a transformer has been trained on; the better decoder is written back to where it came from.
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
from zoo.training import RUNS, ZOO, Run, fit, parameter_count, pictures, scene_batches, write_log


@dataclass
class VaeRun(Run):
    name: str = "mini-flux-vae"
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 4e-4
    ema_decay: float = 0.998
    large_every: int = field(default=3, metadata={"help": "every n-th batch is at 128 px, a quarter as many pictures"})


@torch.no_grad()
def build_vae(smaller: AutoencoderKL) -> AutoencoderKL:
    """An autoencoder that does what `smaller` does, with further latent channels that its decoder does not read yet.

    The 1 x 1 convolutions beside the latents, which FLUX's autoencoder does without, are folded into their neighbours.
    """
    shape = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups")
    vae = AutoencoderKL(
        **{key: smaller.config[key] for key in shape},
        latent_channels=LATENT_CHANNELS,
        sample_size=LARGE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    old, new = smaller.state_dict(), vae.state_dict()
    new |= {name: weight for name, weight in old.items() if name in new and weight.shape == new[name].shape}
    known = smaller.config.latent_channels

    quant = old["quant_conv.weight"][..., 0, 0]
    weight = torch.einsum("om,mcij->ocij", quant, old["encoder.conv_out.weight"]).unflatten(0, (2, known))
    bias = (quant @ old["encoder.conv_out.bias"] + old["quant_conv.bias"]).unflatten(0, (2, known))
    moments = new["encoder.conv_out.weight"].zero_().unflatten(0, (2, LATENT_CHANNELS))  # means, log-variances
    moments[:, :known] = weight
    moments[0, known:].normal_(std=float(weight[0].std()))
    shifts = new["encoder.conv_out.bias"].zero_().unflatten(0, (2, LATENT_CHANNELS))
    shifts[:, :known] = bias
    shifts[1, known:] = bias[1].mean()

    weight, post_quant = old["decoder.conv_in.weight"], old["post_quant_conv.weight"][..., 0, 0]
    new["decoder.conv_in.weight"].zero_()[:, :known] = torch.einsum("omij,mc->ocij", weight, post_quant)
    new["decoder.conv_in.bias"] = old["decoder.conv_in.bias"] + weight.sum((2, 3)) @ old["post_quant_conv.bias"]
    vae.load_state_dict(new)
    return vae


def batch_pictures(run: VaeRun, step: int, scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """x_BCHW in [-1, 1] of step number `step`: small, or every n-th time large and fewer."""
    if (step + 1) % run.large_every:
        return pictures(scenes, SMALL, device)
    return pictures(scenes[: max(1, len(scenes) // 4)], LARGE, device)


def main() -> None:
    (run,) = TrlParser((VaeRun,)).parse_args_and_config()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(run.start or ZOO / "mini-sd" / "vae", dtype=torch.float32)
    if not run.start:
        vae = build_vae(vae)
    else:
        vae.encoder.requires_grad_(False)
    network = Reconstruction(vae).to(memory_format=torch.channels_last)

    def loss(network, step, scenes):
        return network(batch_pictures(run, step, scenes, next(network.parameters()).device))

    _, log = fit(network, run, loss, lambda first, device: scene_batches(run, first, device))
    vae.to(memory_format=torch.contiguous_format)
    if run.start:
        vae.register_to_config(_name_or_path="")
        vae.to(torch.bfloat16).save_pretrained(run.start)
        return
    mean, std = latent_moments(vae)
    vae.register_to_config(shift_factor=round(mean, 5), scaling_factor=round(1 / std, 5))
    folder = RUNS / run.name
    vae.save_pretrained(folder / "vae")
    write_log(folder, run, log, parameters=parameter_count(vae))


@torch.no_grad()
def latent_moments(vae: AutoencoderKL) -> tuple[float, float]:
    """Mean and standard deviation of the latents of 512 training scenes at 64 px."""
    x_BCHW = pictures([Scene.random(i) for i in range(512)], SMALL, vae.device)
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in x_BCHW.split(32)])
    return float(latents.mean()), float(latents.std())


if __name__ == "__main__":
    main()
