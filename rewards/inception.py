"""Inception: would a classifier see the same?"""

import torch
from torch import nn

from rewards.networks import CosineReward


class InceptionReward(CosineReward):
    """(cos + 1) · 50 of the class logits (1000 for ImageNet), not the pooled features; identical images score 100."""

    name = "inception"
    default_model = "timm/inception_v3.tv_in1k"
    libraries = ("timm",)

    def _check_network(self, network: nn.Module) -> None:
        if network.num_classes == 0:
            raise ValueError(
                f"{self.model!r} has no classes, so no logits. Use a classifier, {self.default_model!r} say."
            )

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values_BCHW)
