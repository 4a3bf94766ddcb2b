"""Pixels: the peak signal-to-noise ratio of the RGB images themselves."""

import torch

from rewards.base import Reward, psnr


class PixelReward(Reward):
    """PSNR = 10 log10(1 / MSE) in decibels, clamped to [0, 100]; identical images score 100.

    Features are the images, uint8 (B, 3, H, W). A target of another size, which the public code resizes,
    is an error.

    Raises:
        ValueError: `model` is given; there is no network.
    """

    name = "pixels"

    def __init__(
        self, model: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        if model is not None:
            raise ValueError(f"the {self.name} reward has no network, got model={model!r}. Leave it out.")
        super().__init__(self.name, device)

    def _features(self, images_u8_BCHW: torch.Tensor) -> torch.Tensor:
        return images_u8_BCHW

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        return psnr(features / 255, target_features / 255).clamp(0, 100)
