"""Pictures into latents, and the autoencoder's memory at large sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderTiny, DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from solver.samplers.latents import precise_vae

# Pixels. Decoded whole, FLUX's 4096² needs some 80 GiB in bfloat16, and 2048² still 19, more than its transformer does
# at 4096²; this one 11. The public code tiles all sizes but the base.
LARGEST_WHOLE_PICTURE = 1536**2


@torch.no_grad()
def encode(pipe: DiffusionPipeline, images_BCHW: Tensor) -> Tensor:
    """Latents of pictures, the mode of the posterior: the inverse of `latents.decode`.

    Args:
        pipe: of an image family.
        images_BCHW: (B, 3, H, W) in [0, 1]; what lies outside stays outside.

    Returns:
        float32 (B, C, h, w), scaled as the denoiser expects it.
    """
    vae = pipe.vae
    with precise_vae(pipe):
        images = (2 * images_BCHW - 1).to(get_module_execution_device(vae), vae.dtype)
        if as_frame := isinstance(vae, AutoencoderKLQwenImage):
            images = images.unsqueeze(2)
        encoded = vae.encode(images)
    latents = (encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()).float()
    latents = latents[:, :, 0] if as_frame else latents
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    scale = vae.config.get("scaling_factor") or 1
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value).to(latents).view(1, -1, 1, 1) for value in (mean, std))
        return (latents - mean) * scale / std
    return (latents - (vae.config.get("shift_factor") or 0)) * scale


@contextmanager
def encoded_as_modes(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, whoever samples what the autoencoder encodes gets the mode of the posterior, as `encode` does.

    Pipelines sample a control image: SD3's from the global generator, FLUX's from that of the picture, whose first
    numbers are the noise that the picture begins with.
    """
    vae, own = pipe.vae, vars(pipe.vae).get("encode")
    encode_ = vae.encode

    def encode_mode(*args, **kwargs):
        encoded = encode_(*args, **kwargs)
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is not None:
            posterior.sample = lambda generator=None: posterior.mode()
        return encoded

    vae.encode = encode_mode
    try:
        yield
    finally:
        if own is None:
            del vae.encode
        else:  # somebody's own stands in for the class's
            vae.encode = own


@contextmanager
def tiled_where_needed(pipe: DiffusionPipeline, height: int, width: int) -> Iterator[None]:
    """Inside, the autoencoder works in tiles if the picture is larger than 1536². It never depends on free memory, so
    that a picture is the same on every machine. Tiling that was on stays on.
    """
    needed = height * width > LARGEST_WHOLE_PICTURE and not getattr(pipe.vae, "use_tiling", False)
    if needed:
        pipe.vae.enable_tiling()
    try:
        yield
    finally:
        if needed:
            pipe.vae.disable_tiling()
