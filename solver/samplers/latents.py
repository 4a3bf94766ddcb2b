"""Latents of a pipeline: their shape, their layout, and the way back to pictures.

    shape = latent_shape(pipe, height, width)                    # (C, H, W), of videos (C, T, H, W)
    latents = pipe(prompts, latents=pack(pipe, noise), output_type="latent", return_dict=False)[0]
    images = decode(pipe, unpack(pipe, latents, shape))

Everything outside a pipeline call is B C H W, or B C T H W for videos. The packed families (FLUX, Qwen-Image) see
2 x 2 blocks as tokens, (B, H/2 · W/2, 4C), row by row; the others take latents as they are. Covered: every pipeline on
an `AutoencoderKL` or `AutoencoderTiny` (SD, SDXL, SD3, PixArt, FLUX.1 with Kontext, Chroma), Qwen-Image, Wan and
HunyuanVideo; others raise.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    DiffusionPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils.torch_utils import get_module_execution_device

from solver.samplers.cost import LARGEST_SIDE

IMAGE_VAES = (AutoencoderKL, AutoencoderTiny, AutoencoderKLQwenImage)
VIDEO_VAES = (AutoencoderKLWan, AutoencoderKLHunyuanVideo)
BESIDE = 0x5E1EC700  # flips bits of a picture's seed, so that what is drawn beside its noise does not repeat it


def is_video(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline makes videos.

    Raises:
        ValueError: the pipeline's latents have a layout that is not known here.
    """
    vae = pipe.components.get("vae")
    if not isinstance(vae, IMAGE_VAES + VIDEO_VAES):
        raise ValueError(
            f"{type(pipe).__name__} has a {type(vae).__name__} as its vae; latents are understood of pipelines with "
            f"one of {', '.join(known.__name__ for known in IMAGE_VAES + VIDEO_VAES)}."
        )
    return isinstance(vae, VIDEO_VAES)


def is_packed(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline takes packed tokens. Raises ValueError as `is_video`."""
    return not is_video(pipe) and hasattr(pipe, "_pack_latents")


def has_flux_transformer(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's transformer is of the FLUX type."""
    transformer = pipe.components.get("transformer")
    return isinstance(getattr(transformer, "_orig_mod", transformer), FluxTransformer2DModel)  # compiled ones too


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The network that is evaluated at every step. Of Wan 2.2's two, the one for the early steps."""
    unet = pipe.components.get("unet")
    return pipe.transformer if unet is None else unet


def vae_factor(pipe: DiffusionPipeline) -> int:
    """How many pixels a latent is high and wide."""
    return pipe.vae_scale_factor_spatial if is_video(pipe) else pipe.vae_scale_factor


def patch_size(pipe: DiffusionPipeline) -> int:
    """How many latents a token is high and wide; 1 for UNets, which have no tokens."""
    if is_packed(pipe):
        return 2
    size = denoiser(pipe).config.get("patch_size") or 1
    return size if isinstance(size, int) else size[-1]  # Wan's is (frames, height, width)


def default_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels of what the weights were trained on.

    The pipeline knows them, but for FLUX's and its like, which answer 128 latents a side whatever the weights are:
    there the transformer has no size, and the autoencoder was trained on it. 1024 of FLUX.1, 128 of the miniature.
    """
    if is_video(pipe):
        call = inspect.signature(pipe.__call__).parameters
        return call["height"].default, call["width"].default
    unet, side = pipe.components.get("unet"), pipe.vae.config.get("sample_size")
    if unet is None and denoiser(pipe).config.get("sample_size") is None and isinstance(side, int):
        return side, side
    sample = pipe.default_sample_size if unet is None else unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def latent_shape(
    pipe: DiffusionPipeline, height: int | None = None, width: int | None = None, num_frames: int | None = None
) -> tuple[int, ...]:
    """(C, H, W) of one image's latents, unpacked; (C, T, H, W) of a video's.

    Args:
        pipe: the pipeline.
        height: of the image, in pixels; the pipeline's own where it is None.
        width: likewise.
        num_frames: of a video, before compression in time; the pipeline's own where it is None.

    Raises:
        ValueError: the size does not divide into tokens, the frames do not compress, an image is asked for frames, or
            `pipe` is of an unknown family.
    """
    height = default_size(pipe)[0] if height is None else height
    width = default_size(pipe)[1] if width is None else width
    multiple = vae_factor(pipe) * patch_size(pipe)
    if not all(0 < side <= LARGEST_SIDE and side % multiple == 0 for side in (height, width)):
        raise ValueError(
            f"height={height}, width={width}: {type(pipe).__name__} needs multiples of {multiple}, at most "
            f"{LARGEST_SIDE}."
        )
    # Not the denoiser's, which may be given more: a mask, a picture to edit.
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    size = (height // vae_factor(pipe), width // vae_factor(pipe))
    if not is_video(pipe):
        if num_frames is not None:
            raise ValueError(f"num_frames={num_frames}: {type(pipe).__name__} makes images.")
        return channels, *size
    if num_frames is None:
        num_frames = inspect.signature(pipe.__call__).parameters["num_frames"].default
    factor = pipe.vae_scale_factor_temporal
    if num_frames < 1 or (num_frames - 1) % factor:
        raise ValueError(f"num_frames={num_frames}: {type(pipe).__name__} needs a multiple of {factor} plus 1.")
    return channels, (num_frames - 1) // factor + 1, *size


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, one seed a row.

    Args:
        seeds: B integers.
        shape: of one row, unpacked, e.g. (C, H, W): `latent_shape(pipeline)`.

    Returns:
        float32 (B, C, H, W) on the CPU. Row b depends on `seeds[b]` and `shape` only.

    Raises:
        ValueError: there are no seeds, or one is no seed, as `seeded` says.
    """
    if not len(seeds):
        raise ValueError("initial_noise needs at least one seed, got none.")
    return torch.stack([torch.randn(*shape, generator=seeded(seed)) for seed in seeds])


def as_seeds(seed: int | Iterable[int]) -> list[int]:
    """One seed or several, as a list. Raises ValueError as `seeded`."""
    seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    for one in seeds:
        seeded(one)
    return [int(one) for one in seeds]


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU. Raises ValueError unless the seed is a whole number of 64 bits, signed or not."""
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: expected a whole number of 64 bits.")
    return torch.Generator().manual_seed(int(seed))


def generator_beside(seed: int, stream: int = 0) -> torch.Generator:
    """Random numbers that belong to a picture, and are not those of its noise.

    The CPU generator reads the low 32 bits of a seed only: streams that differ above them are the same.
    """
    return torch.Generator().manual_seed((seed ^ (BESIDE + stream)) & 0xFFFFFFFF)


def to_tokens(x_BCHW: torch.Tensor) -> torch.Tensor:
    """2 x 2 patches row by row, (B, H/2 · W/2, 4C): channel, row, column, as FLUX packs."""
    patches = x_BCHW.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # B C h p w q
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def to_grid(tokens_BND: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `to_tokens`: (B, C, 2 rows, 2 columns)."""
    patches = tokens_BND.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))  # B h w C p q
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(-3, -2)


def pack(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents as `pipe(latents=...)` takes them, on its device, in the dtype of its run.

    That is the denoiser's for images; videos run in float32 whatever the denoiser.

    Args:
        pipe: the pipeline.
        latents: (B, C, H, W) or (B, C, T, H, W), any floating dtype.
    """
    # Not pipe.device: under offloading that is where weights wait.
    latents = latents.to(pipe._execution_device, torch.float32 if is_video(pipe) else denoiser(pipe).dtype)
    return pipe._pack_latents(latents, *latents.shape) if is_packed(pipe) else latents


def unpack(pipe: DiffusionPipeline, latents: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What `pipe(output_type="latent")` answers, as B C H W or B C T H W; `shape` is that of `latent_shape`."""
    if not is_packed(pipe):
        return latents
    height, width = (side * pipe.vae_scale_factor for side in shape[1:])
    # Qwen-Image's autoencoder is one of videos, and its pipeline puts a frame axis in.
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).reshape(-1, *shape)


def vae_overflows(pipe: DiffusionPipeline) -> bool:
    """Whether the autoencoder is one of float16 that the stock pipeline decodes with in float32: SDXL's."""
    vae = pipe.vae
    return bool(hasattr(pipe, "upcast_vae") and vae.dtype == torch.float16 and vae.config.get("force_upcast"))


@contextmanager
def precise_vae(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, a float16 autoencoder that overflows is a float32 one."""
    upcast = vae_overflows(pipe)
    if upcast:
        pipe.vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if upcast:
            pipe.vae.to(dtype=torch.float16)


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """The pictures behind latents, as the stock pipelines decode them: in the VAE's dtype, or see `precise_vae`.

    Args:
        pipe: the pipeline.
        latents: (B, C, H, W), of videos (B, C, T, H, W).

    Returns:
        float32 (B, 3, H, W) in [0, 1] on the pipeline's device, of videos (B, F, 3, H, W). NaN stays NaN.
    """
    vae = pipe.vae
    with precise_vae(pipe):
        latents = latents.to(get_module_execution_device(vae), vae.dtype)
        if as_frame := isinstance(vae, AutoencoderKLQwenImage):
            latents = latents.unsqueeze(2)
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        scale = vae.config.get("scaling_factor") or 1
        if mean is not None and std is not None:
            channelwise = (1, -1, *[1] * (latents.ndim - 2))
            mean, std = (torch.tensor(value).to(latents).view(channelwise) for value in (mean, std))
            latents = latents * std / scale + mean
        else:
            latents = latents / scale + (vae.config.get("shift_factor") or 0)
        pictures = vae.decode(latents, return_dict=False)[0].float()
    if is_video(pipe):
        return pipe.video_processor.postprocess_video(pictures, output_type="pt")
    return pipe.image_processor.postprocess(pictures[:, :, 0] if as_frame else pictures, output_type="pt")
