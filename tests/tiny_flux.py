"""zoo/mini-flux with small random networks: a folder that FluxPipeline and FluxKontextPipeline load."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from zoo.mini_flux import LATENT_CHANNELS, Denoiser, Tokenizers, assemble, build_networks, open_tokenizers

CLIP = Path(__file__).parents[1] / "zoo" / "clip"


def tiny_vae() -> AutoencoderKL:
    """A quarter of the size, as the real one."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )


def tiny_networks(seed: int = 0) -> tuple[Denoiser, AutoencoderKL, Tokenizers]:
    """One joint and two single blocks; their modulations, which begin at zero, are drawn."""
    torch.manual_seed(seed)
    tokenizers = open_tokenizers(CLIP)
    denoiser = build_networks(CLIP, tokenizers, width=32, joint_layers=1, single_layers=2)
    for name, parameter in denoiser.transformer.named_parameters():
        if ("norm" in name and parameter.ndim == 2) or name.startswith("proj_out"):
            torch.nn.init.normal_(parameter, std=0.2)
    return denoiser, tiny_vae(), tokenizers


def save_tiny_flux(folder: Path, seed: int = 0) -> Path:
    assemble(*tiny_networks(seed), folder)
    return folder
