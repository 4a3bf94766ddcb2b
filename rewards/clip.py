"""CLIP: does the picture say the same?"""

import torch
from torch import nn
from transformers import AutoModel

from rewards.networks import CosineReward


class ClipReward(CosineReward):
    """(cos + 1) · 50 of the projected CLIP image features, in [0, 100]; identical images score 100."""

    name = "clip"
    default_model = "openai/clip-vit-large-patch14"
    auto_class = AutoModel

    def _check_network(self, network: nn.Module) -> None:
        if not hasattr(network, "get_image_features"):
            raise ValueError(
                f"{self.model!r} is a {type(network).__name__}, which has no get_image_features. Use a CLIPModel."
            )

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        return self.network.get_image_features(pixel_values=pixel_values_BCHW).pooler_output
