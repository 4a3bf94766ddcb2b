"""What is seen in a picture that is larger than its model knows: is it the same one, is it sharp, is it true?

    pictures, base = ...                                # float (B, 3, H, W) and (B, 3, h, w) in [0, 1]
    low_band_correlation(pictures, base, cutoff=0.1)    # (B,), 1 where the coarse picture is the base's
    edge_sharpness(pictures, window=9)                  # (B,), in (0, 1]: 1 is a step from one pixel to the next

Shape suffixes: B, N images, C H W large pictures, h w base pictures, P patches of a picture, D features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.bootstrap import Estimate, mean, statistic
from evaluation.metrics import caption_check, frechet, frechet_distance
from rewards import Reward
from solver.samplers.hiflow.lowpass import lowpass

LOW_BAND = (
    0.4  # of the Nyquist frequency of the base's latents, the band that the public code aligns at twice the size
)
EDGES = 0.05  # share of a picture, around its strongest edges
MEANS = ("caption_check", "low_band", "wide_band", "edge_sharpness")  # one number a picture
PATCH = 64  # pixels; what zoo/dino sees without resizing


def shrink(images_BCHW: Tensor, height: int, width: int) -> Tensor:
    """To a smaller size, without aliasing."""
    return F.interpolate(images_BCHW, (height, width), mode="bilinear", antialias=True, align_corners=False)


def low_band_correlation(images_BCHW: Tensor, base_BChw: Tensor, cutoff: float) -> Tensor:
    """Pearson correlation of two pictures below `cutoff` Nyquist frequencies of the smaller one, (B,).

    The large picture is shrunk to the base's size; means of channels are left out, so that a brighter picture is the
    same one. A flat picture correlates 0.
    """
    pair = shrink(images_BCHW, *base_BChw.shape[-2:]), base_BChw
    low, base = (lowpass(x - x.mean((2, 3), keepdim=True), cutoff).flatten(1) for x in pair)
    return F.cosine_similarity(low, base, dim=1)


def edge_sharpness(images_BCHW: Tensor, window: int) -> Tensor:
    """How much of an edge's contrast is crossed within one pixel, (B,), at most 1.

    In a window around each pixel: the largest difference of two neighbours over the largest difference of all, of the
    colour channel it is seen in. Averaged over the twentieth of the picture where that contrast is highest, so that
    neither the number of edges nor their strength counts. A step gives 1, a straight ramp of n pixels 1/n.

    Args:
        images_BCHW: pictures.
        window: in pixels, odd; an edge that is wider counts as this wide.
    """

    def largest(x_BCHW: Tensor) -> Tensor:
        return F.max_pool2d(x_BCHW, window, stride=1, padding=window // 2)

    across = F.pad(images_BCHW.diff(dim=3).abs(), (0, 1))
    down = F.pad(images_BCHW.diff(dim=2).abs(), (0, 0, 0, 1))
    contrast = (largest(images_BCHW) + largest(-images_BCHW)).flatten(1)
    steepest = largest(torch.maximum(across, down)).flatten(1)
    strongest, places = contrast.topk(max(1, round(EDGES * contrast.shape[1])), dim=1)
    share = steepest.gather(1, places) / strongest.clamp_min(1e-6)
    return share.clamp(max=1).mean(1)  # the pair of neighbours may reach one pixel out of the window


def patches(images_BCHW: Tensor, numbers: Sequence[int], count: int, size: int = PATCH) -> Tensor:
    """Random crops, (B, P, C, size, size); picture number n has the same ones in every row of a table."""
    height, width = images_BCHW.shape[-2:]
    crops = []
    for image_CHW, number in zip(images_BCHW, numbers, strict=True):
        draw = torch.Generator().manual_seed(number)
        tops = torch.randint(height - size + 1, (count,), generator=draw).tolist()
        lefts = torch.randint(width - size + 1, (count,), generator=draw).tolist()
        places = zip(tops, lefts, strict=True)
        crops.append(torch.stack([image_CHW[:, y : y + size, x : x + size] for y, x in places]))
    return torch.stack(crops)


class Looker:
    """Everything that is measured in the pictures of one size.

    Args:
        dino: of the Fréchet distances.
        segmentation: its labels answer the questions of the captions.
        count: patches of a picture.
        vae_factor: pixels of a latent. The low band is `LOW_BAND` of the base's latents, which HiFlow aligns; a wider
            one, as much of its pixels, shows how much of the rest stays.
    """

    def __init__(self, dino: Reward, segmentation: Reward, count: int, vae_factor: int):
        self.dino, self.segmentation, self.count, self.vae_factor = dino, segmentation, count, vae_factor

    def __call__(
        self, images_BCHW: Tensor, base_BChw: Tensor, prompts: Sequence[str], numbers: Sequence[int]
    ) -> dict[str, Tensor]:
        """Tensors (B, ...) on the CPU, by name; `whole` (B, D) and `patches` (B, P, D) are features."""
        images_BCHW, base_BChw = images_BCHW.float().clamp(0, 1), base_BChw.float()
        small = shrink(images_BCHW, *base_BChw.shape[-2:]).clamp(0, 1)
        crops_BPCHW = patches(images_BCHW, numbers, self.count)
        window = 4 * max(1, images_BCHW.shape[-1] // base_BChw.shape[-1]) + 1  # four pixels of the base
        seen = {
            "whole": self.dino.features(images_BCHW),
            "patches": self.dino.features(crops_BPCHW.flatten(0, 1)).unflatten(0, (-1, self.count)),
            "caption_check": caption_check(self.segmentation.features(small), list(prompts)),
            "low_band": low_band_correlation(images_BCHW, base_BChw, LOW_BAND / self.vae_factor),
            "wide_band": low_band_correlation(images_BCHW, base_BChw, LOW_BAND),
            "edge_sharpness": edge_sharpness(images_BCHW, window),
        }
        return {name: value.float().cpu() for name, value in seen.items()}


def estimates(seen: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Estimate]:
    """All numbers of a row over its N pictures, with their bootstrap over prompts; rows of a table pair."""
    x_NPD, y_NPD = seen["patches"], reference["patches"]
    x, y = x_NPD.flatten(0, 1), y_NPD.flatten(0, 1)

    def of_patches(weights_N: Tensor) -> float:
        weights = weights_N.repeat_interleave(x_NPD.shape[1]) / x_NPD.shape[1]
        return frechet_distance(x, y, weights, weights)

    return {
        "frechet": frechet(seen["whole"], reference["whole"], paired=True),
        "frechet_patches": statistic(of_patches, len(x_NPD)),
        **{name: mean(seen[name]) for name in MEANS},
    }
