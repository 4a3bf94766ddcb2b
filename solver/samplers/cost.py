"""What a run costs before it is paid: FLOPs of a denoiser's evaluation, from the shape of the network alone.

    network = NETWORKS["flux-dev"]
    evaluation_flops(network, image_tokens(network, 1024, 1024))  # 7.44e13
    evaluation_flops(network, 1330, attention=False)  # 2.38e13, as the fused attention kernels hide it from counters
    network = network_of(pipe.transformer)  # any transformer of these families, the miniatures too

Two FLOPs a multiply-add. Matrix products and convolutions are counted, as `torch.utils.flop_counter` counts them;
norms, activations and rotations are not. Everything is a polynomial in the numbers of tokens, so a network is its
coefficients. Publications often leave attention out (a profiler does not see fused kernels): it is counted here, and
`attention=False` gives their numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

TIME_CHANNELS = 256  # of the sinusoidal embedding of the timestep
LARGEST_SIDE = 2**16  # of a picture, in pixels: no device holds a larger one


@dataclass(frozen=True)
class Network:
    """FLOPs of one evaluation, as coefficients, and how a run of the published model is set up.

    Attributes:
        image, text: FLOPs a token of the image, of the text.
        fixed: FLOPs whatever the tokens: timestep, pooled text, modulation.
        joint: FLOPs of attention a squared token, image and text together.
        image_attention, text_attention: likewise, of attention within the image, within the text.
        cross_attention: FLOPs of attention a pair of an image and a text token.
        text_tokens: usual length of the prompt.
        branches: evaluations a step; 2 where classifier-free guidance is the usual way.
        pixels: side of an image token in pixels.
        frames: frames that share a token; the first one stands alone (1 for images).
        text_encoding: FLOPs of the text encoders in a run, 0 where they are not known here.
        t5_tokens: how many of the text's tokens T5 makes; 0 where no T5 is in `text_encoding`.
        decoding: FLOPs of the VAE's decoder a pixel without its attention, 0 where they are not known here.
    """

    image: float
    text: float
    fixed: float
    joint: float = 0.0
    image_attention: float = 0.0
    text_attention: float = 0.0
    cross_attention: float = 0.0
    text_tokens: int = 512
    branches: int = 1
    pixels: int = 16
    frames: int = 1
    text_encoding: float = 0.0
    t5_tokens: int = 0
    decoding: float = 0.0


def evaluation_flops(
    network: Network, image_tokens: float, text_tokens: int | None = None, attention: bool = True
) -> float:
    """FLOPs of one evaluation on one image, one branch of the guidance.

    Args:
        network: its coefficients.
        image_tokens: those of the image and whatever else runs through its stream (Kontext's reference image).
        text_tokens: the network's usual number where it is None.
        attention: whether the products of queries, keys and values are counted.
    """
    text_tokens = network.text_tokens if text_tokens is None else text_tokens
    linear = network.fixed + network.image * image_tokens + network.text * text_tokens
    if not attention:
        return linear
    squares = network.image_attention * image_tokens**2 + network.text_attention * text_tokens**2
    pairs = network.joint * (image_tokens + text_tokens) ** 2 + network.cross_attention * image_tokens * text_tokens
    return linear + squares + pairs


def run_flops(
    network: Network,
    evaluations: list[tuple[float, int]],
    text_tokens: int | None = None,
    attention: bool = True,
    branches: int | None = None,
) -> float:
    """FLOPs of the denoiser in a run, every branch of the guidance counted.

    Args:
        network: its coefficients.
        evaluations: pairs (image tokens, steps).
        text_tokens: the network's usual number where it is None.
        attention: whether attention is counted.
        branches: evaluations a step; the network's usual number where it is None.
    """
    branches = network.branches if branches is None else branches
    return branches * sum(steps * evaluation_flops(network, n, text_tokens, attention) for n, steps in evaluations)


def image_tokens(network: Network, height: int, width: int, frames: int = 1) -> int:
    """Tokens of an image or a video.

    Raises:
        ValueError: the size does not divide into tokens, the frames into groups, or an image is asked for frames.
    """
    if not all(0 < side <= LARGEST_SIDE and side % network.pixels == 0 for side in (height, width)):
        raise ValueError(
            f"height={height}, width={width}: expected positive multiples of {network.pixels} pixels, at most "
            f"{LARGEST_SIDE}."
        )
    if network.frames == 1 and frames != 1:
        raise ValueError(f"frames={frames}: this model makes images; leave them out.")
    if frames < 1 or (frames - 1) % network.frames:
        raise ValueError(f"frames={frames}: expected 1 more than a multiple of {network.frames}.")
    return (height // network.pixels) * (width // network.pixels) * (1 + (frames - 1) // network.frames)


def decoding_flops(network: Network, height: int, width: int, attention: bool = True) -> float:
    """FLOPs of decoding one image of this size in pixels; 0 where the decoder is not known here."""
    pixels = height * width
    in_the_middle = 4 * 512 * (pixels / 64) ** 2 if attention and network.decoding else 0.0  # one block, 512 wide
    return network.decoding * pixels + in_the_middle


# ---------------------------------------------------------------------------------------------------------------------
# Families: coefficients from the names of the diffusers configs
# ---------------------------------------------------------------------------------------------------------------------


def flux(
    *,
    num_layers: int = 19,
    num_single_layers: int = 38,
    attention_head_dim: int = 128,
    num_attention_heads: int = 24,
    in_channels: int = 64,
    out_channels: int | None = None,
    joint_attention_dim: int = 4096,
    pooled_projection_dim: int = 768,
    guidance_embeds: bool = False,
    **_,
) -> Network:
    """FLUX.1: blocks of two streams, then blocks of one."""
    d, blocks = num_attention_heads * attention_head_dim, num_layers + num_single_layers
    embedders = (2 if guidance_embeds else 1) * _mlp(TIME_CHANNELS, d) + _mlp(pooled_projection_dim, d)
    modulation = 12 * num_layers + 3 * num_single_layers + 2
    return Network(
        image=2 * (12 * d**2 * blocks + (in_channels + (out_channels or in_channels)) * d),
        text=2 * (12 * d**2 * blocks + joint_attention_dim * d),
        fixed=2 * (modulation * d**2 + embedders),
        joint=4 * d * blocks,
    )


def sd3(
    *,
    num_layers: int = 18,
    attention_head_dim: int = 64,
    num_attention_heads: int = 18,
    patch_size: int = 2,
    in_channels: int = 16,
    out_channels: int = 16,
    joint_attention_dim: int = 4096,
    caption_projection_dim: int = 1152,
    pooled_projection_dim: int = 2048,
    dual_attention_layers: Sequence[int] = (),
    **_,
) -> Network:
    """SD3 and SD3.5: blocks of two streams, the last of which leaves the text alone."""
    d, dual = num_attention_heads * attention_head_dim, len(dual_attention_layers)
    embedders = _mlp(TIME_CHANNELS, d) + _mlp(pooled_projection_dim, d)
    return Network(
        image=2 * ((12 * num_layers + 4 * dual) * d**2 + patch_size**2 * (in_channels + out_channels) * d),
        text=2 * ((12 * num_layers - 9) * d**2 + joint_attention_dim * caption_projection_dim),
        fixed=2 * ((12 * num_layers - 4 + 3 * dual + 2) * d**2 + embedders),
        joint=4 * d * num_layers,
        image_attention=4 * d * dual,
        text_tokens=333,
        branches=2,
    )


def qwen_image(
    *,
    num_layers: int = 60,
    attention_head_dim: int = 128,
    num_attention_heads: int = 24,
    patch_size: int = 2,
    in_channels: int = 64,
    out_channels: int = 16,
    joint_attention_dim: int = 3584,
    **_,
) -> Network:
    """Qwen-Image: blocks of two streams throughout."""
    d = num_attention_heads * attention_head_dim
    return Network(
        image=2 * (12 * d**2 * num_layers + (in_channels + patch_size**2 * out_channels) * d),
        text=2 * (12 * d**2 * num_layers + joint_attention_dim * d),
        fixed=2 * ((12 * num_layers + 2) * d**2 + _mlp(TIME_CHANNELS, d)),
        joint=4 * d * num_layers,
        branches=2,
    )


def wan(
    *,
    num_layers: int = 40,
    attention_head_dim: int = 128,
    num_attention_heads: int = 40,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    in_channels: int = 16,
    out_channels: int = 16,
    text_dim: int = 4096,
    freq_dim: int = TIME_CHANNELS,
    ffn_dim: int = 13824,
    **_,
) -> Network:
    """Wan: attention within the video, then across to the text."""
    d, volume = num_attention_heads * attention_head_dim, patch_size[0] * patch_size[1] * patch_size[2]
    return Network(
        image=2 * (num_layers * (6 * d**2 + 2 * d * ffn_dim) + volume * (in_channels + out_channels) * d),
        text=2 * (num_layers * 2 * d**2 + _mlp(text_dim, d)),
        fixed=2 * (_mlp(freq_dim, d) + 6 * d**2),
        image_attention=4 * d * num_layers,
        cross_attention=4 * d * num_layers,
        branches=2,
        frames=4,
    )


def hunyuan_video(
    *,
    num_layers: int = 20,
    num_single_layers: int = 40,
    num_refiner_layers: int = 2,
    attention_head_dim: int = 128,
    num_attention_heads: int = 24,
    patch_size: int = 2,
    patch_size_t: int = 1,
    in_channels: int = 16,
    out_channels: int = 16,
    text_embed_dim: int = 4096,
    pooled_projection_dim: int = 768,
    guidance_embeds: bool = True,
    **_,
) -> Network:
    """HunyuanVideo: FLUX's blocks behind a small transformer that refines the text."""
    d, blocks = num_attention_heads * attention_head_dim, num_layers + num_single_layers
    volume = patch_size_t * patch_size**2
    embedders = (2 if guidance_embeds else 1) * _mlp(TIME_CHANNELS, d) + _mlp(pooled_projection_dim, d)
    refiner = _mlp(TIME_CHANNELS, d) + _mlp(text_embed_dim, d) + 2 * d**2 * num_refiner_layers
    return Network(
        image=2 * (12 * d**2 * blocks + volume * (in_channels + out_channels) * d),
        text=2 * (12 * d**2 * (blocks + num_refiner_layers) + text_embed_dim * d),
        fixed=2 * ((12 * num_layers + 3 * num_single_layers + 2) * d**2 + embedders + refiner),
        joint=4 * d * blocks,
        text_attention=4 * d * num_refiner_layers,
        text_tokens=256,
        frames=4,
    )


FAMILIES = {
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
    "QwenImageTransformer2DModel": qwen_image,
    "WanTransformer3DModel": wan,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
}


def network_of(denoiser, pixels: int = 16, text_tokens: int | None = None) -> Network:
    """The coefficients of a diffusers transformer, from its config.

    Args:
        denoiser: the model.
        pixels: side of a token in pixels: the VAE's factor times the patch.
        text_tokens: usual length of the prompt; the family's where it is None.

    Raises:
        ValueError: the class is none of `FAMILIES`.
    """
    family = FAMILIES.get(type(denoiser).__name__)
    if family is None:
        raise ValueError(f"{type(denoiser).__name__}: its cost is known of {', '.join(FAMILIES)} only.")
    network = family(**denoiser.config)
    return replace(network, pixels=pixels, text_tokens=network.text_tokens if text_tokens is None else text_tokens)


def _mlp(inputs: int, width: int) -> int:
    """Multiply-adds of two linear layers, inputs -> width -> width."""
    return inputs * width + width**2


# ---------------------------------------------------------------------------------------------------------------------
# Published models, beside the denoiser
# ---------------------------------------------------------------------------------------------------------------------


def t5_xxl(tokens: int) -> float:
    """FLOPs of T5 v1.1 XXL's encoder on one prompt; its attention is not fused, so counters see it."""
    layers, width, hidden = 24, 4096, 10240
    return layers * (2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width)


def clip_text(layers: int, width: int, tokens: int = 77) -> float:
    """FLOPs of a CLIP text encoder on one prompt, without attention."""
    return 2 * tokens * layers * 12 * width**2


# The decoder of SD, SDXL, SD3 and FLUX.1: channels 128, 256, 512, 512, counted at 1024 x 1024.
KL_DECODER = 9_922_448_261_120 / 1024**2
CLIP_L, CLIP_G = clip_text(12, 768), clip_text(32, 1280)

FLUX_DEV = replace(flux(guidance_embeds=True), text_encoding=t5_xxl(512) + CLIP_L, t5_tokens=512, decoding=KL_DECODER)
SD3_ENCODING = t5_xxl(256) + CLIP_L + CLIP_G
SD3_MEDIUM = replace(
    sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
    text_encoding=2 * SD3_ENCODING,
    t5_tokens=256,
    decoding=KL_DECODER,
)
SD35_LARGE = replace(
    sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432),
    text_encoding=2 * SD3_ENCODING,
    t5_tokens=256,
    decoding=KL_DECODER,
)
# A UNet has no single width: these are counted on their shapes, at several sizes and lengths of the text. A token is a
# latent pixel.
SDXL = Network(
    image=361_620_480,
    text=681_574_400,
    fixed=49_807_360,
    image_attention=2_800,
    cross_attention=25_600,
    text_tokens=77,
    branches=2,
    pixels=8,
    text_encoding=2 * (CLIP_L + CLIP_G),
    decoding=KL_DECODER,
)

SD15 = Network(
    image=164_602_880,
    text=38_338_560,
    fixed=55_705_600,
    image_attention=7_301.25,
    cross_attention=11_280,
    text_tokens=77,
    branches=2,
    pixels=8,
    text_encoding=2 * CLIP_L,
    decoding=KL_DECODER,
)

NETWORKS: dict[str, Network] = {
    "flux-dev": FLUX_DEV,
    "flux-schnell": replace(flux(), text_encoding=t5_xxl(512) + CLIP_L, t5_tokens=512, decoding=KL_DECODER),
    "sd3-medium": SD3_MEDIUM,
    "sd3.5-medium": replace(
        sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, dual_attention_layers=range(13)),
        text_encoding=2 * SD3_ENCODING,
        t5_tokens=256,
        decoding=KL_DECODER,
    ),
    "sd3.5-large": SD35_LARGE,
    "sd3.5-large-turbo": replace(SD35_LARGE, branches=1, text_encoding=SD3_ENCODING),
    "sdxl": SDXL,
    "sd1.5": SD15,
    "qwen-image": qwen_image(),
    "wan2.1-1.3b": wan(num_layers=30, num_attention_heads=12, ffn_dim=8960),
    "wan2.1-14b": wan(),
    "hunyuan-video": hunyuan_video(),
}


def text_length(network: Network, tokens: int) -> Network:
    """The network with prompts of another length, which T5 reads where it is known.

    Raises:
        ValueError: `tokens` is negative, or less than other encoders than T5 give.
    """
    t5 = network.t5_tokens + tokens - network.text_tokens if network.t5_tokens else 0
    if tokens < 0 or t5 < 0:
        least = network.text_tokens - network.t5_tokens if network.t5_tokens else 0
        raise ValueError(f"text_tokens={tokens}: expected at least {least}.")
    more = network.branches * (t5_xxl(t5) - t5_xxl(network.t5_tokens))
    return replace(network, text_tokens=tokens, t5_tokens=t5, text_encoding=network.text_encoding + more)
