"""Networks that rewards look through: loaded from a hub id or a local folder, fed as their own files say.

The library is read off `config.json`, never guessed from the name:

| key of config.json | library                     | preprocessing from                                              |
|--------------------|-----------------------------|-----------------------------------------------------------------|
| `model_type`       | transformers                | `preprocessor_config.json`                                      |
| `architecture`     | timm                        | `pretrained_cfg` in `config.json`                               |
| `_model_class`     | segmentation_models_pytorch | `preprocessor_config.json`, any image processor of transformers |

segmentation_models_pytorch saves no preprocessing, so its folder gets the same file as a folder of transformers:
`SegformerImageProcessor(size={"height": 64, "width": 64}, image_mean=..., image_std=...).save_pretrained(folder)`, or
`do_normalize=False` for a network that eats [0, 1]. Without the file the folder is refused: a wrong mean stays unseen.

Preprocessing is torchvision's, on the 8-bit batch, on its device: what Pillow gives, up to a rounding in a few pixels.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rewards.base import Reward

LIBRARIES = {"model_type": "transformers", "architecture": "timm", "_model_class": "smp"}

Preprocess = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, 3, H, W) -> float32 (B, 3, h, w)


class NetworkReward(Reward):
    """A reward that looks through a network: preprocess, `_run`, `_encode`.

    A subclass sets `name`, `default_model`, `libraries` (those it can read) and, for transformers, `auto_class`.

    Args:
        model: hub id or local folder; `default_model` where it is None.
        device: where the network runs.
        dtype: of the weights. Features are computed from its output in float32.

    Raises:
        OSError: the folder or repository is missing, or lacks its config, weights or preprocessing.
        ValueError: it holds a network of another kind.
    """

    name: str
    default_model: str
    libraries: tuple[str, ...] = ("transformers",)
    auto_class: type | None = None

    def __init__(
        self, model: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        super().__init__(self.name, device)
        self.model = self.default_model if model is None else str(model)
        self.dtype = dtype
        self.library = find_library(self.model)
        if self.library not in self.libraries:
            raise ValueError(
                f"{self.model!r} is a {self.library} model; the {self.name} reward reads models of "
                f"{' or '.join(self.libraries)}, such as {self.default_model!r}."
            )
        network, self.preprocess = load_network(self.model, self.library, self.auto_class)
        self._check_network(network)
        self.network = network.to(self.device, dtype).eval()

    def to(self, device: str | torch.device) -> "NetworkReward":
        self.network.to(device)
        return super().to(device)

    def _features(self, images_u8_BCHW: torch.Tensor) -> torch.Tensor:
        output = self._run(self.preprocess(images_u8_BCHW).to(self.device, self.dtype)).float()
        if not output.isfinite().all():
            raise ValueError(f"{self.model!r} answers with NaN or infinity in {self.dtype}. Use dtype=torch.float32.")
        return self._encode(output, images_u8_BCHW.shape[-2:])

    def _check_network(self, network: nn.Module) -> None:
        """Raises ValueError if the network, though of the right library, is not what the reward needs."""

    def _run(self, pixel_values_BCHW: torch.Tensor) -> torch.Tensor:
        """The raw answer of the network."""
        raise NotImplementedError

    def _encode(self, output: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        """From the raw answer, float32, to the features."""
        return output


class CosineReward(NetworkReward):
    """A network reward on vectors, features float32 (B, D): (cos + 1) · 50, so 100 is parallel and 50 orthogonal."""

    def _similarity(self, features: torch.Tensor, target_features: torch.Tensor) -> torch.Tensor:
        cosine = F.cosine_similarity(features.float(), target_features.float(), dim=-1)
        return (cosine.clamp(-1, 1) + 1) * 50


def find_library(model: str) -> str:
    """Which library a hub id or local folder belongs to: "transformers", "timm" or "smp", from its config.json.

    Raises:
        OSError: no such folder or repository, or no config.json or safetensors weights in the folder.
        ValueError: the config.json is of none of the three, or is not JSON.
    """
    path = find_config(model)
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Save the network anew, or fetch it again.") from error
    for key, library in LIBRARIES.items():
        if key in config:
            return library
    raise ValueError(
        f"the config.json of {model!r} has none of the keys {', '.join(LIBRARIES)}: it was not saved by transformers, "
        "timm or segmentation_models_pytorch. Save the network with its library's own save function."
    )


def find_config(model: str) -> Path:
    """Path of the config.json of a local folder, or of a repository on the hub (downloaded, or from the cache)."""
    folder = Path(bare_name(model))
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            return Path(cached_file(bare_name(model), "config.json"))
        except OSError as error:
            raise OSError(
                f"{model!r} is no folder here, and no model repository on the hub or in its cache: {error}"
            ) from error
    if not (folder / "config.json").is_file():
        raise OSError(f"{model!r} is not a model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise OSError(f"{model!r} has a config.json but no weights: a *.safetensors file is missing.")
    return folder / "config.json"


def bare_name(model: str) -> str:
    """The hub id or folder without timm's prefixes."""
    return model.removeprefix("hf-hub:").removeprefix("local-dir:")


def load_network(model: str, library: str, auto_class: type | None) -> tuple[nn.Module, Preprocess]:
    """The network of a hub id or folder, float32 on the CPU, and what to do to images before it."""
    from safetensors import SafetensorError

    name = bare_name(model)
    try:
        if library == "timm":
            return load_timm(name)
        network = load_transformers(name, auto_class) if library == "transformers" else load_smp(name)
        return network, image_processor(name)
    except (RuntimeError, SafetensorError, TypeError, AttributeError) as error:
        raise OSError(
            f"{model!r} cannot be loaded as a {library} model: {error}. Save it anew, or fetch it again."
        ) from error


def load_transformers(name: str, auto_class: type) -> nn.Module:
    network, report = auto_class.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers only warns, and fills them with random numbers
        raise OSError(f"{name!r} lacks {len(missing)} weights of a {type(network).__name__}, such as {missing[0]!r}.")
    return network


def load_smp(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.from_pretrained(name, encoder_weights=None)  # the config may name ImageNet weights, to be downloaded


def load_timm(name: str) -> tuple[nn.Module, Preprocess]:
    import timm

    source = "local-dir" if Path(name).is_dir() else "hf-hub"
    network = timm.create_model(f"{source}:{name}", pretrained=True)
    return network, timm_transform(timm.data.resolve_model_data_config(network))


def timm_transform(config: dict) -> Preprocess:
    """timm's evaluation transform for 8-bit batches; `timm.data.create_transform` makes the one for Pillow images.

    Raises:
        ValueError: a crop mode that pads, or a non-square input, which timm resizes in another way.
    """
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import v2

    _, height, width = config["input_size"]
    mode = config["crop_mode"]
    if height != width or mode not in ("center", "squash"):
        raise ValueError(
            f"crop mode {mode!r} to {height}x{width} is not supported: only 'center' or 'squash' to a square."
        )
    scaled = math.floor(height / config["crop_pct"])
    return v2.Compose([
        v2.Resize(scaled if mode == "center" else (scaled, scaled), str_to_interp_mode(config["interpolation"])),
        v2.CenterCrop(height),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config["mean"], config["std"]),
    ])  # fmt: skip


def image_processor(name: str) -> Preprocess:
    """The model's own image processor, on tensors.

    Raises:
        OSError: no preprocessor_config.json.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"no image processor for {name!r}: preprocessor_config.json is missing or unreadable. Save the one that "
            "the network was trained with into the folder, as in SegformerImageProcessor(...).save_pretrained(folder)."
        ) from error
    return lambda images_u8_BCHW: processor(images=images_u8_BCHW, return_tensors="pt")["pixel_values"]
