"""Depth: is the space the same? The default reward for text-to-image previews."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForDepthEstimation

from rewards.base import psnr
from rewards.networks import NetworkReward


class DepthReward(NetworkReward):
    """PSNR of depth maps in decibels, each min–max normalised on its own: 10 log10(1 / (MSE + 1e-8)), clamped to ≥ 0.

    Identical images score 80. Features are float16 (B, H, W) in [0, 1] at the size of the image; a flat map is all 0.
    Their rounding (error ≤ 2.5e-4) only shows above 70 dB, and preview and target are rounded alike.

    Reads transformers depth models, and segmentation_models_pytorch networks with one output channel.
    """

    name = "depth"
    default_model = "depth-anything/Depth-Anything-V2-Small-hf"
    libraries = ("transformers", "smp")
    auto_class = AutoModelForDepthEstimation

    def _check_network(self, network: nn.Module) -> None:
        channels = 1 if self.library == "transformers" else network.config["classes"]
        if channels != 1:
            raise ValueError(f"{self.model!r} has {channels} output channels; a depth network has 1.")

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        if self.library == "smp":
            return self.network(pixel_values_BCHW).squeeze(1)
        return self.network(pixel_values=pixel_values_BCHW).predicted_depth

    def _encode(self, depth_Bhw: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        # Bicubic, as transformers' post_process_depth_estimation does it.
        depth_BHW = F.interpolate(depth_Bhw[:, None], size=image_size, mode="bicubic", align_corners=False)[:, 0]
        low, high = depth_BHW.amin((1, 2), keepdim=True), depth_BHW.amax((1, 2), keepdim=True)
        return ((depth_BHW - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)).half()

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        return psnr(features.float(), target_features.float(), floor=1e-8).clamp_min(0)
