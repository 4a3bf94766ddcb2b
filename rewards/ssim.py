"""SSIM: structural similarity of the RGB images themselves (Wang et al. 2004)."""

import torch
import torch.nn.functional as F

from rewards.pixels import PixelReward

WINDOW, SIGMA = 11, 1.5  # pixels of the Gaussian window, and its standard deviation
C1, C2 = 0.01**2, 0.03**2  # for values in [0, 1]


class SSIMReward(PixelReward):
    """100 · SSIM, in [-100, 100], the mean over channels and windows; identical images score 100.

    SSIM = (2 μx μy + C1) (2 σxy + C2) / ((μx² + μy² + C1) (σx² + σy² + C2)), its moments weighed by a Gaussian. Only
    windows that lie inside the image count.

    Features are the images, uint8 (B, 3, H, W).

    Raises:
        ValueError: `model` is given; there is no network. In a call: a side is shorter than the window.
    """

    name = "ssim"

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        if min(features.shape[-2:]) < WINDOW:
            height, width = features.shape[-2:]
            raise ValueError(f"the ssim reward looks through windows of {WINDOW} pixels; {height}x{width} is smaller.")
        x, y = features / 255, target_features / 255
        mean_x, mean_y, xx, yy, xy = blur(torch.stack([x, y, x * x, y * y, x * y]))
        var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
        structure = (2 * cov + C2) / (var_x + var_y + C2)
        return 100 * (luminance * structure).flatten(1).mean(dim=1)


def blur(values_NBCHW: torch.Tensor) -> torch.Tensor:
    """Gaussian means of all windows inside the images, (N, B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, device=values_NBCHW.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2).to(values_NBCHW)
    weights /= weights.sum()
    planes = values_NBCHW.flatten(0, 2)[:, None]
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes[:, 0].unflatten(0, values_NBCHW.shape[:3])
