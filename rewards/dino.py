"""DINO: is it the same picture as a whole? The default reward for image editing."""

import torch
from torch import nn
from transformers import AutoModel

from rewards.networks import CosineReward


class DinoReward(CosineReward):
    """(cos + 1) · 50 of the class tokens after the last norm, in [0, 100]; identical images score 100.

    Reads vision transformers with a class token, of transformers or timm.
    """

    name = "dino"
    default_model = "facebook/dinov2-base"
    libraries = ("transformers", "timm")
    auto_class = AutoModel

    def _check_network(self, network: nn.Module) -> None:
        if not any(name.endswith("cls_token") for name, _ in network.named_parameters()):
            raise ValueError(
                f"{self.model!r} is a {type(network).__name__} without a class token. Use a DINOv2 network."
            )

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        if self.library == "timm":
            return self.network.forward_features(pixel_values_BCHW)[:, 0]
        return self.network(pixel_values=pixel_values_BCHW).last_hidden_state[:, 0]
