"""What HiFlow is given: whether it fits the pipeline, and the pipeline's arguments for every picture."""

import inspect
import math
from collections.abc import Sequence

from diffusers import DiffusionPipeline, FluxTransformer2DModel
from PIL import ImageOps
from PIL.Image import Image, alpha_composite, new
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from solver.samplers.calls import guides_by_true_cfg
from solver.samplers.hiflow.plan import Stage, ladder
from solver.samplers.latents import as_seeds, default_size, denoiser, is_video, latent_shape, patch_size, vae_factor

OURS = (
    *("prompt", "latents", "height", "width", "num_inference_steps", "sigmas", "timesteps", "guidance_scale"),
    *("generator", "num_images_per_prompt", "output_type", "return_dict", "denoising_start", "denoising_end"),
)  # arguments of a pipeline that are said in another way here
FEW_STEPS = 4  # of FLUX schnell
UNET_MULTIPLE = 8  # pixels, of which the stock pipelines of UNets take multiples, whatever their autoencoder
# One a picture, or one for all.
TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Raises ValueError unless the pipeline makes pictures from noise that it is given."""
    if is_video(pipe):
        raise ValueError(f"{type(pipe).__name__} makes videos; HiFlow is for pipelines that make images.")
    takes = inspect.signature(pipe.__call__).parameters
    if "latents" not in takes or "strength" in takes:
        raise ValueError(
            f"{type(pipe).__name__} does not begin with noise that it is given; take the text-to-image pipeline of "
            "the same model, and image= for a picture to enlarge."
        )


def size_multiple(pipe: DiffusionPipeline) -> int:
    """In pixels, of which heights and widths have to be multiples: a token, and what the stock pipeline asks for."""
    token = vae_factor(pipe) * patch_size(pipe)
    return math.lcm(token, UNET_MULTIPLE) if pipe.components.get("unet") is not None else token


def native_size(pipe: DiffusionPipeline) -> tuple[int, int] | None:
    """What a transformer is made for. None of UNets and PixArt, which keep neither shift nor positions."""
    return default_size(pipe) if hasattr(pipe, "default_sample_size") else None


def check_mixable(pipe: DiffusionPipeline) -> None:
    """Raises ValueError where the tokens of the picture cannot be mixed, or are not all that there is."""
    if pipe.components.get("controlnet") is not None:
        raise ValueError("edges_first: a ControlNet sees all tokens at every step; leave one of the two out.")
    network = denoiser(pipe)
    if type(network) is not FluxTransformer2DModel:
        raise ValueError(
            f"edges_first mixes tokens of a FluxTransformer2DModel and cannot see into a {type(network).__name__}. "
            "A compiled one works with transformer.compile_repeated_blocks()."
        )
    if network.config.in_channels != latent_shape(pipe, *default_size(pipe))[0] * patch_size(pipe) ** 2:
        raise ValueError(
            f"edges_first: the tokens of {type(pipe).__name__} hold a control image beside the picture; leave "
            "edges_first out."
        )


def largest_side(pipe: DiffusionPipeline) -> int | None:
    """In pixels, where SD3's table of positions ends; None for models that have no table."""
    table = getattr(getattr(denoiser(pipe), "pos_embed", None), "pos_embed_max_size", None)
    return table and table * vae_factor(pipe) * patch_size(pipe)


def check_positions(pipe: DiffusionPipeline, largest: Stage) -> None:
    """Raises ValueError where the model has no positions for so large a picture."""
    side = largest_side(pipe)
    if side is not None and max(largest.height, largest.width) > side:
        raise ValueError(
            f"{largest.height} x {largest.width}: {type(denoiser(pipe)).__name__} has positions for {side} pixels a "
            "side and no more."
        )


def usual_sizes(pipe: DiffusionPipeline, image: Tensor | Image | None) -> list[tuple[int, int]]:
    """Where none are given: what the model knows, or a given image's own size, twice and four times it a side.

    Raises:
        ValueError: the model has no positions for twice the size.
    """
    base = default_size(pipe) if image is None else tuple(as_pixels(image).shape[-2:])
    sizes = ladder(base, largest := largest_side(pipe))
    if len(sizes) < 2:
        raise ValueError(
            f"{type(denoiser(pipe)).__name__} has positions for {largest} pixels a side, so {base[0]} x {base[1]} "
            "cannot be doubled: give sizes."
        )
    return sizes


def picture_call(pipe, prompt, seed, call: dict) -> tuple[dict, list[int]]:
    """The pipeline's arguments for B pictures, and their seeds."""
    if ours := sorted(set(call) & set(OURS)):
        raise ValueError(f"call has {', '.join(ours)}: hiflow says these itself, through its own arguments.")
    if unknown := sorted(set(call) - set(inspect.signature(pipe.__call__).parameters)):
        raise ValueError(f"call has {', '.join(unknown)}, which {type(pipe).__name__} does not take.")
    if call.get("eta"):
        raise ValueError(f"eta={call['eta']}: HiFlow's stages are deterministic, leave it out.")
    seeds = as_seeds(seed)
    if prompt is None:
        if call.get("prompt_embeds") is None:
            raise ValueError("There is neither a prompt nor prompt_embeds in call.")
        if len(call["prompt_embeds"]) != len(seeds):
            raise ValueError(f"{len(call['prompt_embeds'])} rows of prompt_embeds, but {len(seeds)} seeds: one each.")
        return call, seeds
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(seeds) or not seeds:
        raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds: every picture has one of each.")
    spread = {name: [call[name]] * len(seeds) for name in TEXTS if isinstance(call.get(name), str)}
    return {**call, **spread, "prompt": prompts}, seeds


def check_guidance(pipe, call: dict) -> None:
    """A guidance scale of FLUX schnell or Qwen-Image is a `true_cfg_scale`, which needs a negative prompt."""
    if not guides_by_true_cfg(pipe):
        return
    if "true_cfg_scale" in call:
        raise ValueError(
            f"call has true_cfg_scale={call['true_cfg_scale']}, which is what guidance_scale is for "
            f"{type(pipe).__name__} with this model: give one of the two."
        )
    if call.get("prompt") is None and call.get("negative_prompt_embeds") is None:
        raise ValueError("guidance_scale with prompt_embeds needs negative_prompt_embeds in call as well.")


def check_negatives(pipe, call: dict, stages: Sequence[Stage]) -> None:
    """Raises ValueError where the call says what the pictures shall not show, and no stage would look at it."""
    said = [name for name, value in call.items() if name.startswith("negative_") and _says(value)]
    if not said or (call.get("true_cfg_scale") or 1) > 1:
        return
    takes = inspect.signature(pipe.__call__).parameters
    if denoiser(pipe).config.get("guidance_embeds"):
        raise ValueError(
            f"call has {', '.join(said)}, but this {type(pipe).__name__} is told its guidance_scale and looks at no "
            "negative prompt: leave it out, or give true_cfg_scale above 1 in call as well."
        )
    own = takes["true_cfg_scale" if guides_by_true_cfg(pipe) else "guidance_scale"].default
    scales = [own if stage.guidance_scale is None else stage.guidance_scale for stage in stages]
    if max(scales) <= 1:
        raise ValueError(f"call has {', '.join(said)}, but guidance_scale is {max(scales):g}: it needs more than 1.")


def _says(value) -> bool:
    return any(map(_says, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor) or bool(value)


def given_image(image, base: tuple[int, int], batch: int) -> Tensor:
    """float32 (B, 3, H, W) of the base size."""
    picture = as_pixels(image)
    if picture.ndim != 4 or picture.shape[1] != 3 or len(picture) not in (1, batch):
        raise ValueError(
            f"image of shape {tuple(picture.shape)}: expected (3, H, W), (1, 3, H, W) or ({batch}, 3, H, W)."
        )
    if tuple(picture.shape[-2:]) != base:
        raise ValueError(
            f"image of {picture.shape[-2]} x {picture.shape[-1]} pixels, but sizes begin with {base[0]} x {base[1]}: "
            "resize the image, or let sizes begin with its own."
        )
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(f"image has values from {picture.min():g} to {picture.max():g}: expected [0, 1].")
    return picture.expand(batch, -1, -1, -1)


def as_pixels(image) -> Tensor:
    """float32 (1, 3, H, W) of a PIL image, upright as its EXIF says, what is transparent on white; a tensor as it is.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(image, Tensor | Image):
        raise ValueError(f"image is a {type(image).__name__}: expected a PIL image or a tensor.")
    picture = image if isinstance(image, Tensor) else to_tensor(_upright_rgb(image))
    return (picture if picture.ndim == 4 else picture[None]).float()


def _upright_rgb(image: Image) -> Image:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = alpha_composite(new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
