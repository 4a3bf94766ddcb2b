"""DINO: is it the same picture as a whole, the default reward for image editing; and is it so everywhere?"""

import torch
import torch.nn.functional as F
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

    def _tokens(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, tokens, D): the class token, registers if there are any, patches."""
        if self.library == "timm":
            return self.network.forward_features(pixel_values_BCHW)
        return self.network(pixel_values=pixel_values_BCHW).last_hidden_state

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        return self._tokens(pixel_values_BCHW)[:, 0]


class DinoPatchReward(DinoReward):
    """(cos + 1) · 50 of the patch tokens after the last norm, the mean over patches; identical images score 100.

    A perceptual distance in the manner of LPIPS, on DINO's last layer: for unit vectors |a - b|² = 2 - 2 cos. Features
    are float16 (B, patches, D).
    """

    name = "dino_patches"

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        return self._tokens(pixel_values_BCHW)[:, self._first_patch :]

    def _encode(self, output: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        return F.normalize(output, dim=-1).half()

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        return super()._similarity(features, target_features).mean(dim=-1)

    @property
    def _first_patch(self) -> int:
        if self.library == "timm":
            return self.network.num_prefix_tokens
        return 1 + getattr(self.network.config, "num_register_tokens", 0)
