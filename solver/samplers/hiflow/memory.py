"""How much memory a cascade needs, estimated before it runs.

What counts is the hungriest stage: either the denoiser's activations, or the autoencoder's. Both grow with the area;
with fused attention nothing grows faster. The constants are counted on the blocks, in multiples of tokens x width; for
FLUX.1-dev at 4096² in bfloat16 with a tiled autoencoder they make 44 GiB, where 48 to 50 GB are reported. Good enough
to refuse what cannot fit, not to fill a card to the last GiB.
"""

import inspect
from collections.abc import Sequence

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


def check_memory(pipe: DiffusionPipeline, stages: Sequence[Stage], batch: int, call: dict | None = None) -> None:
    """Raises ValueError where a stage cannot fit into the free memory of the pipeline's device."""
    more = _text_tokens(pipe, call or {}), _condition_tokens(pipe, call or {})
    needed, worst = max(((_stage_bytes(pipe, stage, batch, *more), stage) for stage in stages), key=lambda row: row[0])
    device = pipe._execution_device
    needed += max((_bytes(part) for part in (denoiser(pipe), pipe.vae) if _waits_elsewhere(part, device)), default=0)
    free = _free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{worst.height} x {worst.width} in a batch of {batch} needs about {needed / GIB:.1f} GiB on {device}, "
            f"where {free / GIB:.1f} GiB are free. What helps: {', '.join(_remedies(pipe, worst, batch, device))}; "
            "ignore_memory=True goes on regardless."
        )


def _remedies(pipe: DiffusionPipeline, worst: Stage, batch: int, device: torch.device) -> list[str]:
    """What would lower the estimate."""
    tiles = worst.height * worst.width > TILE and not getattr(pipe.vae, "use_tiling", False)
    offers = {
        "fewer pictures at once": batch > 1,
        "smaller sizes": True,
        "pipe.enable_model_cpu_offload()": device.type != "cpu" and not _waits_elsewhere(pipe.vae, device),
        "a quantised transformer": device.type != "cpu",
        "pipe.vae.enable_tiling()": tiles,
        "half precision": denoiser(pipe).dtype.itemsize > 2,
    }
    return [offer for offer, helps in offers.items() if helps]


def _stage_bytes(pipe: DiffusionPipeline, stage: Stage, batch: int, text: int = 0, condition: int = 0) -> float:
    network = denoiser(pipe)
    unet = pipe.components.get("unet") is not None
    if unet:
        width, pixels = network.config.block_out_channels[0], vae_factor(pipe)
    else:
        width = network.config.num_attention_heads * network.config.attention_head_dim
        pixels = vae_factor(pipe) * patch_size(pipe)
    at_once = 1 if stage.edge_steps else batch  # with few tokens first, pictures are walked one by one
    rows = at_once * (2 if _guided_in_one_batch(pipe) else 1)
    image = (stage.height // pixels) * (stage.width // pixels)
    tokens = rows * (image + condition + text * stage.text_copies[0] * stage.text_copies[1])
    tiled = getattr(pipe.vae, "use_tiling", False)
    value_bytes = 4 if vae_overflows(pipe) else pipe.vae.dtype.itemsize
    return max(
        activation_bytes(tokens, width, network.dtype.itemsize, unet),
        batch * decoder_bytes(stage.height, stage.width, value_bytes, tiled, _vae_channels(pipe)),
    )


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


def _waits_elsewhere(part: nn.Module, device: torch.device) -> bool:
    """Whether a component comes to the device as a whole when it is needed. Layer by layer (meta) it hardly counts."""
    return next(part.parameters()).device.type not in (device.type, "meta")


def _bytes(part: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in part.parameters())


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
