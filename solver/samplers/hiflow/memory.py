"""How much memory a cascade needs, estimated before it runs.

What counts is the hungriest stage: either the denoiser's activations, or the autoencoder's. Both grow with the area;
with fused attention nothing grows faster. The constants are counted on the blocks, in multiples of tokens x width; for
FLUX.1-dev at 4096² in bfloat16 with a tiled autoencoder they make 44 GiB, where 48 to 50 GB are reported. Good enough
to refuse what cannot fit, not to fill a card to the last GiB.
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from solver.samplers.hiflow.pixels import LARGEST_WHOLE_PICTURE
from solver.samplers.hiflow.plan import Stage
from solver.samplers.latents import denoiser, patch_size, vae_factor, vae_overflows

GIB = 1024**3
BLOCK_WIDTHS = 32  # tensors of tokens x width alive at once in a transformer block, rotations in float32 included
UNET_WIDTHS = 24  # likewise of latent pixels x first channels in a UNet, skip connections included
DECODER_WIDTHS = 18.75  # likewise of pixels x first channels in a decoder: of FLUX's, 80 GB at 4096² in bfloat16
DECODER_CHANNELS = 128  # first channels of the published autoencoders
TILE = 1024**2  # pixels
KONTEXT_AREA = 1024**2  # pixels, to which Kontext scales what it edits


def activation_bytes(tokens: float, width: int, bytes_per_value: int, unet: bool = False) -> float:
    """Of one evaluation of the denoiser: `tokens` of the picture, a condition and the text, or latent pixels."""
    return tokens * width * (UNET_WIDTHS if unet else BLOCK_WIDTHS) * bytes_per_value


def decoder_bytes(
    height: int, width: int, bytes_per_value: int, tiled: bool = False, channels: int = DECODER_CHANNELS
) -> float:
    """Of decoding one picture, in tiles above 1536², or always if `tiled`, by a decoder of so many first channels."""
    pixels = height * width
    in_tiles = tiled or pixels > LARGEST_WHOLE_PICTURE
    return (min(TILE, pixels) if in_tiles else pixels) * DECODER_WIDTHS * channels * bytes_per_value


class Setting(NamedTuple):
    """What the estimate depends on, beside the pipeline's shape and the stages; a remedy changes it.

    Attributes:
        batch: pictures at once.
        tiled, sliced: whether the autoencoder works in tiles at any size, and picture by picture.
        offloaded: whether all weights wait elsewhere until they are needed; else they stay where they are.
        widest: bytes of a value, at most.
    """

    batch: int
    tiled: bool
    sliced: bool
    offloaded: bool = False
    widest: int = 8


def check_memory(pipe: DiffusionPipeline, stages: Sequence[Stage], batch: int, call: dict | None = None) -> None:
    """Raises ValueError where a stage cannot fit into the free memory of the pipeline's device."""
    call, device, vae = call or {}, pipe._execution_device, pipe.vae
    tiled, sliced = (getattr(vae, name, False) for name in ("use_tiling", "use_slicing"))
    now = Setting(batch, tiled, sliced)
    needed, worst = max(((_stage_bytes(pipe, stage, now, call), stage) for stage in stages), key=lambda row: row[0])
    free = _free_bytes(device)
    if needed <= free:
        return

    def helps(**change) -> bool:
        changed = now._replace(**change)
        less = max(_stage_bytes(pipe, stage, changed, call) for stage in stages)
        leaves = [part for part in _networks(pipe) if _device_type(part) == device.type] if changed.offloaded else []
        return less - sum(map(_bytes, leaves)) < needed

    on_gpu = device.type != "cpu"
    offers = {
        "fewer pictures at once": batch > 1 and helps(batch=1),
        "smaller sizes": True,
        "pipe.enable_model_cpu_offload()": on_gpu and not _waits(vae, device) and helps(offloaded=True),
        "a quantised transformer": on_gpu,
        "pipe.vae.enable_tiling()": helps(tiled=True),
        "pipe.vae.enable_slicing()": hasattr(vae, "enable_slicing") and helps(sliced=True),
        "half precision": helps(widest=2),
    }
    raise ValueError(
        f"{worst.height} x {worst.width} in a batch of {batch} needs about {needed / GIB:.1f} GiB on {device}, where "
        f"{free / GIB:.1f} GiB are free. What helps: {', '.join(offer for offer, here in offers.items() if here)}; "
        "ignore_memory=True goes on regardless."
    )


def _stage_bytes(pipe: DiffusionPipeline, stage: Stage, setting: Setting, call: dict) -> float:
    """Of the hungriest moment of a stage: the text encoders', the denoiser's or the autoencoder's."""
    network = denoiser(pipe)
    unet = pipe.components.get("unet") is not None
    if unet:
        width, pixels = network.config.block_out_channels[0], vae_factor(pipe)
    else:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        pixels = vae_factor(pipe) * patch_size(pipe)
    at_once = 1 if stage.edge_steps else setting.batch  # with few tokens first, pictures are walked one by one
    rows = at_once * (2 if _guided_in_one_batch(pipe) else 1)
    image = (stage.height // pixels) * (stage.width // pixels)
    text = _text_tokens(pipe, call) * stage.text_copies[0] * stage.text_copies[1]
    tokens = rows * (image + _condition_tokens(pipe, call) + text)
    value_bytes = min(network.dtype.itemsize, setting.widest)
    denoising = activation_bytes(tokens, width, value_bytes, unet)
    value_bytes = 4 if vae_overflows(pipe) else min(pipe.vae.dtype.itemsize, setting.widest)
    decoded = 1 if setting.sliced else setting.batch
    decoding = decoded * decoder_bytes(stage.height, stage.width, value_bytes, setting.tiled, _vae_channels(pipe))
    coming = [part for part in _networks(pipe) if setting.offloaded or _waits(part, pipe._execution_device)]
    weights = {part: _bytes(part) for part in coming}
    denoising, decoding = denoising + weights.pop(network, 0), decoding + weights.pop(pipe.vae, 0)
    return max(denoising, decoding, *weights.values())


def _networks(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _vae_channels(pipe: DiffusionPipeline) -> int:
    """First channels of the decoder; Qwen-Image's names them otherwise."""
    widths = pipe.vae.config.get("block_out_channels")
    return widths[0] if widths else pipe.vae.config.get("base_dim") or DECODER_CHANNELS


def _text_tokens(pipe: DiffusionPipeline, call: dict) -> int:
    """Of a prompt, in a transformer's sequence; UNets have them in cross-attention only."""
    if pipe.components.get("unet") is not None:
        return 0
    if call.get("prompt_embeds") is not None:
        return call["prompt_embeds"].shape[1]
    longest = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    return 0 if longest is None else call.get(longest.name) or longest.default


def _condition_tokens(pipe: DiffusionPipeline, call: dict) -> int:
    """Of the image that Kontext edits: latents as they are, pictures near the area that it scales them to."""
    image = call.get("image")
    if image is None or "max_area" not in inspect.signature(pipe.__call__).parameters:
        return 0
    image = image[0] if isinstance(image, list | tuple) else image
    width, height = image.size if isinstance(image, Image) else (image.shape[-1], image.shape[-2])
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == pipe.latent_channels:
        return height * width // patch_size(pipe) ** 2
    pixels = KONTEXT_AREA if call.get("_auto_resize", True) else height * width
    return pixels // (vae_factor(pipe) * patch_size(pipe)) ** 2


def _guided_in_one_batch(pipe: DiffusionPipeline) -> bool:
    """Whether both branches of classifier-free guidance are evaluated at once, as all but the FLUX family do it."""
    return not hasattr(pipe, "_pack_latents")


def _waits(part: nn.Module, device: torch.device) -> bool:
    """Whether a component comes to the device as a whole when it is needed. Layer by layer (meta) it hardly counts."""
    return _device_type(part) not in (device.type, "meta")


def _device_type(part: nn.Module) -> str:
    """Where its weights lie; one that has none is nowhere, and counts as little as one on meta."""
    return next((parameter.device.type for parameter in part.parameters()), "meta")


def _bytes(part: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in part.parameters())


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
