"""What every reward shares: the two calls, the checks on their input, and the decibel.

    features(images_BCHW) -> tensor (B, ...)         what the reward looks at, compact enough for a dataset to keep
    similarity(features, target_features) -> (B,)    float32, higher is better

Shape suffixes: B batch, C channels, H, W image size, h, w network output size, D vector length.
"""

import torch


class Reward:
    """How alike two batches of images are, seen through one kind of features.

    A subclass gives `_features(images_u8_BCHW)` and `_similarity(features, target_features)`; both see checked input.
    An instance is also a reward function in TRL's sense: it has a `__name__` and is called with keyword columns.

    Args:
        name: the reward's name in logs and dataset columns.
        device: where features are computed. Images are moved there.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self.device = torch.device(device)

    @property
    def __name__(self) -> str:
        return self.name

    def to(self, device: str | torch.device) -> "Reward":
        """Moves the reward to `device` and returns it."""
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """What the reward looks at, one entry an image.

        The images are rounded to 8 bits first. So did the published rewards; and a target that has been through a PNG
        file and a preview that has not are then the same picture if they are the same picture.

        Args:
            images_BCHW: float, RGB, in [0, 1].

        Returns:
            tensor (B, ...) on the reward's device; its dtype is the one to store it in.

        Raises:
            ValueError: the images are not a float (B, 3, H, W) batch within [0, 1].
        """
        check_images(images_BCHW)
        images_u8_BCHW = images_BCHW.to(self.device, torch.float32).mul(255).round().to(torch.uint8)
        # A trainer may sit inside autocast; the targets' features were computed outside it.
        with torch.autocast(self.device.type, enabled=False):
            return self._features(images_u8_BCHW)

    @torch.no_grad()
    def similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        """The score of each row, float32 (B,), higher is better. Rows of the two arguments belong together.

        Raises:
            ValueError: the shapes differ.
        """
        if features.shape != target_features.shape:
            raise ValueError(
                f"reward {self.name!r}: features {tuple(features.shape)} and target features "
                f"{tuple(target_features.shape)} differ in shape. Preview and target need the same batch size, image "
                "size and network: resize the images, or rebuild the cached target features."
            )
        return self._similarity(features, target_features.to(features.device)).float()

    def __call__(self, images: torch.Tensor, target_images=None, target_features=None, **kwargs) -> torch.Tensor:
        """Scores previews against targets, float32 (B,).

        Args:
            images: previews, float (B, 3, H, W) in [0, 1].
            target_images: full-step images, like `images`; needed where `target_features` is not given.
            target_features: `features(target_images)`, kept from an earlier call; saves the second evaluation.
            kwargs: the other columns of the batch, ignored.

        Raises:
            ValueError: neither target is given, or one of the inputs does not fit.
        """
        if target_features is None:
            if target_images is None:
                raise ValueError(f"reward {self.name!r} needs target_images or target_features, got neither.")
            target_features = self.features(target_images)
        return self.similarity(self.features(images), target_features)

    def _features(self, images_u8_BCHW: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def check_images(images_BCHW: torch.Tensor) -> None:
    """Raises ValueError unless `images_BCHW` is a non-empty float batch (B, 3, H, W) of finite values in [0, 1]."""
    if not isinstance(images_BCHW, torch.Tensor):
        raise ValueError(f"images must be a tensor (B, 3, H, W), got {type(images_BCHW).__name__}.")
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or images_BCHW.numel() == 0:
        raise ValueError(f"images must have shape (B, 3, H, W), none of them 0, got {tuple(images_BCHW.shape)}.")
    if not images_BCHW.is_floating_point():
        raise ValueError(
            f"images must be floating point in [0, 1], got {images_BCHW.dtype}. Divide 8-bit images by 255."
        )
    low, high = (bound.item() for bound in images_BCHW.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails every comparison
        raise ValueError(
            f"images must lie in [0, 1], got values from {low} to {high}. Check the decoder's output, or clamp it."
        )


def psnr(images_B: torch.Tensor, target_images_B: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each row in decibels, 10 log10(1 / (MSE + floor)), for float values in [0, 1]."""
    mse = (images_B - target_images_B).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(mse + floor)
