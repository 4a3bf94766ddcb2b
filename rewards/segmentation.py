"""Segmentation: are the same things in the same places?"""

import torch
from torch import nn
from transformers import AutoModelForSemanticSegmentation

from rewards.networks import NetworkReward


class SegmentationReward(NetworkReward):
    """Percentage of pixels with the same label, in [0, 100].

    The public code names it "Dice"; what it computes, and what is computed here, is pixel agreement of the argmax
    labels at the size of the logits. Features are uint8 (B, h, w).

    Reads transformers semantic segmentation models and segmentation_models_pytorch networks, up to 256 classes.
    """

    name = "segmentation"
    default_model = "nvidia/segformer-b4-finetuned-ade-512-512"
    libraries = ("transformers", "smp")
    auto_class = AutoModelForSemanticSegmentation

    def _check_network(self, network: nn.Module) -> None:
        classes = network.config.num_labels if self.library == "transformers" else network.config["classes"]
        if not 2 <= classes <= 256:
            raise ValueError(f"{self.model!r} has {classes} classes; the segmentation reward needs 2 to 256.")

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        if self.library == "smp":
            return self.network(pixel_values_BCHW)
        return self.network(pixel_values=pixel_values_BCHW).logits

    def _encode(self, logits_BKhw: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        return logits_BKhw.argmax(dim=1).to(torch.uint8)

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        return (features == target_features).flatten(1).float().mean(dim=1) * 100
