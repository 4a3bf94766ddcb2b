"""What HiFlow changes inside a FLUX-type transformer while a large stage runs; nothing is left of it afterwards.

    with ExitStack() as patches:
        patches.enter_context(rope_base(pipe, factor=10))
        patches.enter_context(attention_scale(pipe.transformer, tokens=16384, base_tokens=4096))

* `exact_positions`: positions in float32, where bfloat16 would not tell them apart.
* `rope_base`: NTK-aware positions, the base of the rotary embedding times a factor.
* `attention_scale`: proportional attention, logits times √(ln L / ln L₀) for L keys instead of the usual L₀.
* `repeated_text`: one copy of the text a base-size tile of the image.
* `shifted_patches`: the 2 x 2 patch grid moved by one latent pixel at every other step.
* `stretched_condition`: a condition image (Kontext's) covers the larger picture as it covered the base.

All of them are module hooks, wrappers and attributes, so they work under LoRA, ControlNet, offloading, quantised
linear layers and any attention backend. Source: arXiv 2504.06232 and its public code, after I-Max, arXiv 2410.07536.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from solver.samplers.latents import to_grid, to_tokens


def networks(pipe: DiffusionPipeline) -> list[nn.Module]:
    """What sees the picture's tokens: the transformer and its ControlNets, each once."""
    control = pipe.components.get("controlnet")
    several = getattr(control, "nets", [control])  # a union of ControlNets passes its calls on
    return [pipe.transformer, *dict.fromkeys(net for net in several if isinstance(net, nn.Module))]


@contextmanager
def exact_positions(network: nn.Module, grid: tuple[int, int]) -> Iterator[None]:
    """Inside, the picture's tokens have their positions in float32: in bfloat16, those above 256 are rounded together.

    Args:
        network: gets the hook.
        grid: height and width of the image in patches.
    """
    height, width = grid

    def put(_, args, given):
        ids = given["img_ids"].float()
        rows, columns = torch.arange(height, device=ids.device), torch.arange(width, device=ids.device)
        ids[: height * width, 1:] = torch.cartesian_prod(rows, columns).to(ids)
        given["img_ids"] = ids
        return args, given

    with _hooked(network.register_forward_pre_hook(put, with_kwargs=True)):
        yield


@contextmanager
def rope_base(pipe: DiffusionPipeline, factor: float) -> Iterator[None]:
    """Inside, the rotary embeddings of the transformer, and of its ControlNets, have their base times `factor`."""
    embeddings = [
        module
        for name in ("transformer", "controlnet")
        if isinstance(pipe.components.get(name), nn.Module)
        for module in pipe.components[name].modules()
        if {"theta", "axes_dim"} <= vars(module).keys()  # its own: a compiled wrapper answers for what it wraps
    ]
    before = [module.theta for module in embeddings]
    try:
        for module in embeddings:
            module.theta = module.theta * factor
        yield
    finally:
        for module, theta in zip(embeddings, before, strict=True):
            module.theta = theta


@contextmanager
def attention_scale(
    transformer: nn.Module, tokens: int, base_tokens: int, text_copies: int = 1, present: int | None = None
) -> Iterator[None]:
    """Inside, attention logits are √(ln L / ln L₀) times as large; 1 where the image has the base size.

    L counts all keys: the stage's image tokens, those of a condition image, the text with its copies. L₀ counts the
    same for an image of the base size and one copy. The factor goes onto the normalised queries.

    Args:
        transformer: gets the hooks.
        tokens: image tokens of the stage.
        base_tokens: image tokens at the base size.
        text_copies: as `repeated_text` makes them.
        present: image tokens that take part, where a hook inside the transformer's call leaves some out.

    Raises:
        ValueError: no attention layer has a query norm.
    """
    norms = [
        (attention, name)
        for attention in transformer.modules()
        for name in ("norm_q", "norm_added_q")
        if attention._modules.get(name) is not None  # not getattr: a compiled wrapper would answer too
    ]
    if not norms:
        raise ValueError(
            f"{type(transformer).__name__} has no query norms, which proportional attention scales. "
            "Switch it off: replace(recipe, proportional_attention=False)."
        )
    scaled = [_Scaled(getattr(attention, name)) for attention, name in norms]

    def measure(_, args, given):
        image = given["hidden_states"].shape[1]
        text = given["encoder_hidden_states"].shape[1]
        extra = image - tokens  # of a condition image
        keys = (present or tokens) + extra + text * text_copies
        factor = math.sqrt(math.log(keys) / math.log(base_tokens + extra + text))
        for norm in scaled:
            norm.factor = factor

    try:
        for (attention, name), norm in zip(norms, scaled, strict=True):
            setattr(attention, name, norm)
        with _hooked(transformer.register_forward_pre_hook(measure, with_kwargs=True)):
            yield
    finally:
        for (attention, name), norm in zip(norms, scaled, strict=True):
            setattr(attention, name, norm.norm)


class _Scaled(nn.Module):
    """A norm times a factor. A module and not a hook: compiled blocks notice another module, but not a new hook."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.factor = norm, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.factor


@contextmanager
def repeated_text(transformer: nn.Module, copies: tuple[int, int], tile: tuple[int, int]) -> Iterator[None]:
    """Inside, the text tokens come r_h · r_w times, copy (i, j) at the position of tile (i, j) of the image.

    Args:
        transformer: gets the hook.
        copies: (r_h, r_w), how many tiles of the base size fit into the image.
        tile: height and width of the base image, in patches.
    """
    offsets = [(i * tile[0], j * tile[1]) for i in range(copies[0]) for j in range(copies[1])]

    def repeat(_, args, given):
        ids = given["txt_ids"].float()
        given["txt_ids"] = torch.cat([ids + ids.new_tensor([0, *offset]) for offset in offsets])
        given["encoder_hidden_states"] = given["encoder_hidden_states"].repeat(1, len(offsets), 1)
        return args, given

    with _hooked(transformer.register_forward_pre_hook(repeat, with_kwargs=True)):
        yield


@contextmanager
def stretched_condition(transformer: nn.Module, tokens: int, scale: tuple[float, float]) -> Iterator[None]:
    """Inside, position p of a condition image is (p + 1/2) · scale - 1/2.

    Kontext ties its condition to the picture by equal positions. A picture of twice the side has positions up to twice
    as far, so without this the condition would lie on its upper left quarter. Ours: paper and code have no conditions.

    Args:
        transformer: gets the hook.
        tokens: of the picture; those after them are the condition's.
        scale: height and width of the stage over those of the base.
    """

    def stretch(_, args, given):
        ids = given["img_ids"].float()
        condition = (ids[tokens:] + 0.5) * ids.new_tensor([1, *scale]) - ids.new_tensor([0.5, 0.5, 0.5])
        given["img_ids"] = torch.cat([ids[:tokens], condition])
        return args, given

    with _hooked(transformer.register_forward_pre_hook(stretch, with_kwargs=True)):
        yield


@contextmanager
def shifted_patches(pipe: DiffusionPipeline, grid: tuple[int, int], is_shifted: Callable[[], bool]) -> Iterator[None]:
    """Inside, whenever `is_shifted()`, the network sees the latent with a border of one pixel, its answer without.

    That moves the 2 x 2 patches by one latent pixel, so that their seams do not fall onto the same place at each step.
    The public code pads the state itself, with zeros, and has to crop it, the reference and the velocities along with
    it. Here the state keeps its size; the border is a reflection, and position ids are half a patch off, where the
    moved patches really are.

    Args:
        pipe: a FLUX-type pipeline; a ControlNet of it is shifted too.
        grid: height and width of the image in patches.
        is_shifted: asked at each evaluation.
    """
    height, width = grid
    tokens = height * width

    def pad(packed_BND: Tensor) -> Tensor:
        latents = to_grid(packed_BND[:, :tokens], height, width)
        padded = to_tokens(F.pad(latents, (1, 1, 1, 1), mode="reflect"))
        return torch.cat([padded, packed_BND[:, tokens:]], dim=1)

    def pad_condition(condition: Tensor) -> Tensor:
        if condition.ndim == 3:
            return pad(condition)
        border = condition.shape[-1] // (2 * width)  # pixels of the picture, as XLabs' ControlNets take them
        return F.pad(condition, (border,) * 4, mode="reflect")

    def shift(_, args, given):
        if not is_shifted():
            return None
        given["hidden_states"] = pad(given["hidden_states"])
        given["img_ids"] = _half_a_patch_off(given["img_ids"].float(), height, width)
        if (condition := given.get("controlnet_cond")) is not None:
            parts = condition if isinstance(condition, list) else [condition]
            padded = [pad_condition(part) for part in parts]
            given["controlnet_cond"] = padded if isinstance(condition, list) else padded[0]
        return args, given

    def crop(_, args, given, output):
        if not is_shifted():
            return None
        latents = to_grid(output[0][:, : (height + 1) * (width + 1)], height + 1, width + 1)
        sample = torch.cat([to_tokens(latents[..., 1:-1, 1:-1]), output[0][:, (height + 1) * (width + 1) :]], dim=1)
        return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)

    with _hooked(
        *[network.register_forward_pre_hook(shift, with_kwargs=True) for network in networks(pipe)],
        pipe.transformer.register_forward_hook(crop, with_kwargs=True),
    ):
        yield


def _half_a_patch_off(ids_N3: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height + 1, device=ids_N3.device) - 0.5
    columns = torch.arange(width + 1, device=ids_N3.device) - 0.5
    positions = torch.cartesian_prod(rows, columns)
    image = torch.cat([ids_N3[0, 0].expand(len(positions), 1), positions], dim=1)
    return torch.cat([image, ids_N3[height * width :]])


@contextmanager
def _hooked(*handles) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
