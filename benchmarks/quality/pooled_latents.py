"""What `method="mean"` of the preview takes for granted: the 2 x 2 mean of a picture's latents is the latent of the
half-size picture.

Shape suffixes: B pictures, C channels, H W.
"""

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from data.scenes import Scene, render_batch

DIGITS = 4  # of the gain, so that it names the same pictures on every machine


@torch.no_grad()
def measure(pipe: DiffusionPipeline, size: int, count: int, batch_size: int = 20) -> dict:
    """Error per channel on `count` held-out scenes, and the gain fitted to as many others.

    Returns:
        `relative_error`, of the mean, and `with_gain`: RMS error over the deviation of the half-size picture's latent,
        a number a channel; `correlation`; `gain`, factors and offsets for `PreviewOptions.gain`.
    """
    fitted = _gain(*_latents(pipe, size, count, "validation", batch_size))
    mean, small = _latents(pipe, size, count, "test", batch_size)
    factor, offset = (torch.tensor(values).view(1, -1, 1, 1) for values in fitted)
    deviation = small.std((0, 2, 3))

    def error(predicted: Tensor) -> list[float]:
        return ((predicted - small).square().mean((0, 2, 3)).sqrt() / deviation).tolist()

    centred = [x - x.mean((0, 2, 3), keepdim=True) for x in (mean, small)]
    covariance = (centred[0] * centred[1]).mean((0, 2, 3))
    return {
        "scenes": count,
        "relative_error": error(mean),
        "with_gain": error(factor * mean + offset),
        "correlation": (covariance / mean.std((0, 2, 3)) / deviation).tolist(),
        "gain": fitted,
    }


def _latents(pipe: DiffusionPipeline, size: int, count: int, split: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Means of 2 x 2 latents of scenes, and latents of the same scenes at half the size: (B, C, H, W) each."""
    pairs = []
    for first in range(0, count, batch_size):
        scenes = [Scene.random(seed, split) for seed in range(first, min(first + batch_size, count))]
        images_BCHW = render_batch(scenes, size).image.to(pipe.vae.device).float() / 255
        large, small = _encoded(pipe, images_BCHW), _encoded(pipe, F.avg_pool2d(images_BCHW, 2))
        pairs.append((F.avg_pool2d(large, 2).cpu(), small.cpu()))
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


def _encoded(pipe: DiffusionPipeline, images_BCHW: Tensor) -> Tensor:
    """As the denoiser sees them."""
    latents = pipe.vae.encode((2 * images_BCHW - 1).to(pipe.vae.dtype)).latent_dist.mode().float()
    return (latents - (pipe.vae.config.get("shift_factor") or 0)) * pipe.vae.config.scaling_factor


def _gain(mean_BCHW: Tensor, small_BCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Least squares of the half-size picture's latent on the mean, channel by channel: factors and offsets."""
    x, y = (z.transpose(0, 1).flatten(1).double() for z in (mean_BCHW, small_BCHW))
    centre_x, centre_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    factor = ((x - centre_x) * (y - centre_y)).sum(1) / (x - centre_x).square().sum(1)
    offset = centre_y[:, 0] - factor * centre_x[:, 0]
    return tuple(tuple(round(value, DIGITS) for value in values.tolist()) for values in (factor, offset))
