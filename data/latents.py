"""Latents of a pipeline: their shape, their layout, and the way back to pictures.

    noise_BCHW = initial_noise(seeds, latent_shape(pipe))
    latents = pipe(prompts, latents=pack(pipe, noise_BCHW), output_type="latent").images
    images_BCHW = decode(pipe, unpack(pipe, latents, latent_shape(pipe)))

Everything outside a pipeline call is B C H W. The only layout that differs is that of the packed families, which see
2 x 2 blocks as tokens (B, H/2 · W/2, 4C). Covered: every pipeline on an `AutoencoderKL` or `AutoencoderTiny`, that is
SD, SDXL, SD3, PixArt, FLUX.1 (with Kontext), Chroma; others raise.
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline


def is_packed(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline takes packed tokens.

    Raises:
        ValueError: the pipeline's latents have a layout that is not known here.
    """
    vae = pipe.components.get("vae")
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        raise ValueError(
            f"{type(pipe).__name__} has a {type(vae).__name__} as its vae; latents are understood of pipelines with "
            "an AutoencoderKL or AutoencoderTiny (SD, SDXL, SD3, FLUX.1)."
        )
    return hasattr(pipe, "_pack_latents")


def default_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels that the pipeline renders by itself."""
    unet = pipe.components.get("unet")
    sample = pipe.default_sample_size if unet is None else unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def latent_shape(pipe: DiffusionPipeline, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of one image's latents, unpacked.

    Args:
        pipe: the pipeline.
        height: of the image, in pixels; the pipeline's own where it is None.
        width: likewise.

    Raises:
        ValueError: the size does not divide into latents, or `pipe` is of an unknown family.
    """
    packed = is_packed(pipe)
    height, width = height or default_size(pipe)[0], width or default_size(pipe)[1]
    multiple = pipe.vae_scale_factor * (2 if packed else getattr(pipe, "patch_size", 1))
    if height % multiple or width % multiple:
        raise ValueError(f"height={height}, width={width}: {type(pipe).__name__} needs multiples of {multiple}.")
    channels = _denoiser(pipe).config.in_channels // (4 if packed else 1)
    return channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def pack(pipe: DiffusionPipeline, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Latents as `pipe(latents=...)` takes them, in the denoiser's dtype and on its device."""
    latents = latents_BCHW.to(pipe.device, _denoiser(pipe).dtype)
    return pipe._pack_latents(latents, *latents.shape) if is_packed(pipe) else latents


def unpack(pipe: DiffusionPipeline, latents: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What `pipe(output_type="latent")` answers, as B C H W; `shape` is that of `latent_shape`."""
    if not is_packed(pipe):
        return latents
    height, width = (side * pipe.vae_scale_factor for side in shape[1:])
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """The pictures behind latents, as the stock pipelines decode them, in the dtype of the VAE.

    Returns:
        float32 (B, 3, H, W) in [0, 1] on the pipeline's device. NaN stays NaN.
    """
    vae = pipe.vae
    latents_BCHW = latents_BCHW.to(vae.device, vae.dtype)
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(value).to(latents_BCHW).view(1, -1, 1, 1) for value in (mean, std))
        latents_BCHW = latents_BCHW * std / vae.config.scaling_factor + mean
    else:
        latents_BCHW = latents_BCHW / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    images_BCHW = vae.decode(latents_BCHW, return_dict=False)[0].float()
    return pipe.image_processor.postprocess(images_BCHW, output_type="pt")


def _denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    unet = pipe.components.get("unet")
    return pipe.transformer if unet is None else unet
