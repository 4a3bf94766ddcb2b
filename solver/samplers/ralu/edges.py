"""Which cells of the small picture get the full resolution early: those with the most edges.

    scores_Bhw = edge_scores(decode(pipe, x0_BChw), luma="full", pixels=16)
    fine_Bhw = select(scores_Bhw, ratio=0.3)

Canny is the classical one: Sobel gradients, their ridges, two thresholds with hysteresis, with OpenCV's conventions
(aperture 3, |gx| + |gy|, thresholds 100 and 200 on 8-bit luma, no blur), on a batch and on its device. Of cells with
as many edge pixels the one with the steeper gradients counts, and of those that are alike the first in an order that
is scattered over the picture and always the same, so that equal pictures have equal masks.

Source: section 3.2 of arXiv 2507.08422; Sobel in latent space is its Table S3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = (100.0, 200.0)  # of |gx| + |gy| at 8-bit luma
LUMA = ("full", "clipped")
LUMA_WEIGHTS = (0.299, 0.587, 0.114)
STEEPEST = 8 * 255 + 1  # no |gx| + |gy| reaches it
TAN_22_5 = math.tan(math.pi / 8)


def luma_B1HW(images_BCHW: Tensor, luma: str) -> Tensor:
    """8-bit luma of pictures, as floats: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) in 0, 1, … 255.

    Args:
        images_BCHW: pictures.
        luma: "full"; or "clipped", as the public code has it: that of [-1, 1] cut to [0, 1], where all that is darker
            than grey is black and has no edges.

    Raises:
        ValueError: `luma` is neither.
    """
    if luma not in LUMA:
        raise ValueError(f"luma={luma!r}: expected one of {', '.join(LUMA)}.")
    weights = images_BCHW.new_tensor(LUMA_WEIGHTS).view(1, 3, 1, 1)
    y_B1HW = (images_BCHW.float() * weights).sum(1, keepdim=True)
    if luma == "clipped":
        y_B1HW = (2 * y_B1HW - 1).clamp(min=0)
    return (255 * y_B1HW.clamp(0, 1) + 1e-3).floor()  # 1e-3: float32 sums of the weights fall just short of whole


def gradients(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel derivatives across and down, every channel for itself, borders repeated."""
    across = x_BCHW.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    channels = x_BCHW.shape[1]
    kernels = torch.stack([across, across.T])[:, None].repeat(channels, 1, 1, 1)
    padded = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
    return tuple(F.conv2d(padded, kernels, groups=channels).unflatten(1, (channels, 2)).unbind(2))


def canny(luma_B1HW: Tensor, thresholds: tuple[float, float] = THRESHOLDS) -> Tensor:
    """Edges of pictures: boolean (B, 1, H, W).

    Args:
        luma_B1HW: 0 to 255.
        thresholds: a ridge above the second is an edge, one above the first if it hangs on to an edge.
    """
    low, high = thresholds
    gx, gy = gradients(luma_B1HW)
    magnitude = gx.abs() + gy.abs()
    ridge = _is_ridge(magnitude, gx, gy) & (magnitude > low)
    edges = ridge & (magnitude > high)
    while True:  # hysteresis: edges grow along ridges until they do not
        grown = ridge & (F.max_pool2d(edges.float(), 3, 1, 1) > 0)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _is_ridge(magnitude: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """Where the magnitude is largest across the edge: of two equal neighbours the first counts."""
    around = F.pad(magnitude, (1, 1, 1, 1))
    height, width = magnitude.shape[-2:]

    def at(down: int, right: int) -> Tensor:
        return around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    level, steep = gy.abs() < TAN_22_5 * gx.abs(), gy.abs() > (TAN_22_5 + 2) * gx.abs()
    across = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    down = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    falling = (magnitude > at(-1, -1)) & (magnitude > at(1, 1))
    rising = (magnitude > at(-1, 1)) & (magnitude > at(1, -1))
    diagonal = torch.where(gx * gy < 0, rising, falling)
    return torch.where(level, across, torch.where(steep, down, diagonal))


def canny_scores(images_BCHW: Tensor, luma: str, pixels: int) -> Tensor:
    """Edge pixels in each cell: (B, H / pixels, W / pixels).

    Args:
        images_BCHW: small pictures in [0, 1].
        luma: as in `luma_B1HW`.
        pixels: side of a cell, that is of a token of the small picture.
    """
    edges_B1HW = canny(luma_B1HW(images_BCHW, luma))
    return F.avg_pool2d(edges_B1HW.float(), pixels, divisor_override=1)[:, 0]


def edge_scores(images_BCHW: Tensor, luma: str, pixels: int) -> Tensor:
    """As `canny_scores`, and below 1 the steepness of the cell, which ranks those with as many edges."""
    gx, gy = gradients(luma_B1HW(images_BCHW, luma))
    steepness = F.avg_pool2d(gx.abs() + gy.abs(), pixels)[:, 0] / STEEPEST
    return canny_scores(images_BCHW, luma, pixels) + steepness


def sobel_scores(x0_BChw: Tensor) -> Tensor:
    """Gradient in latent space, summed over channels and each cell's 2 x 2 latents; no decoding needed."""
    gx, gy = gradients(x0_BChw.float())
    return F.avg_pool2d(torch.hypot(gx, gy).sum(1, keepdim=True), 2)[:, 0]


def select(scores_Bhw: Tensor, ratio: float) -> Tensor:
    """The floor(ratio · cells) cells of the highest scores of each image: boolean (B, h, w).

    Raises:
        ValueError: ratio is not in (0, 1), or no cell would be chosen.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio}: expected a share between 0 and 1, both excluded.")
    scores = scores_Bhw.flatten(1)
    cells = scores.shape[1]
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(cells)).to(scores.device)
    ranked = order[torch.sort(scores[:, order], dim=1, descending=True, stable=True).indices]
    chosen = ranked[:, : number_of_fine(ratio, cells)]
    fine = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    return fine.view_as(scores_Bhw)


def number_of_fine(ratio: float, cells: int) -> int:
    """How many cells a ratio chooses: 307 of 1024 at 0.3.

    Raises:
        ValueError: it chooses none.
    """
    count = math.floor(ratio * cells + 1e-9)  # 0.3 · 10 is a little less than 3 in floats
    if not count:
        raise ValueError(f"ratio={ratio} of {cells} cells is none; take a larger ratio or a larger picture.")
    return count
