"""Large and small tokens in one sequence, in a stock pipeline's call, as hooks on its transformer.

    with mixed_resolution(pipe.transformer, fine_hw):
        x_BCHW = run_segment(pipe, x_BCHW, segment, **call)

The pipeline's latents stay the full grid, whose coarse cells are constant (all siblings of `noise.siblings` equal).
The hooks gather one token for a coarse cell and four for a fine one, give them their positions, and scatter the
velocity back; every solver that is linear in latents and velocities keeps cells constant, so this is the token list of
the paper, while the pipeline never knows. Afterwards the transformer is as it was.

Covered: FLUX.1 (with Kontext: the tokens of the reference image stay), Qwen-Image, SD3 and SD3.5. There is one mask
for all rows of a call, that is for the branches of the guidance. Qwen-Image rescales its guidance token by token on
the full grid: with copy="token" that is the coarse token's own scale, with "pixel" its four places differ.

Shape suffixes: B rows, C channels, H W latents, h w cells, N tokens of the mixed sequence, D channels of a token.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed_from_grid
from torch import Tensor, nn

from solver.samplers.latents import to_grid, to_tokens
from solver.samplers.ralu.noise import enlarge, on_grid, reduce

ANCHORS = {"corner": 0.0, "centre": 0.25}  # where in its cell a coarse token sits, in small tokens
UNITS = {
    "small": 1.0,
    "full": 2.0,
}  # what a step of 1 in position is: a token of the small picture, or of the full one
HOOK = "ralu_mixed_resolution"


@dataclass(frozen=True)
class MixedTokens:
    """Which tokens there are, and where.

    Attributes:
        fine_hw: boolean, cells of the small picture that have the full resolution.
        copy: "pixel" or "token", as in `noise`.
        anchor: "centre", or "corner" as in the public code, where a coarse token sits on its top left child.
        units: "small" as published, where children have half positions; "full" would be those of the full picture.

    Raises:
        ValueError: `anchor` or `units` is unknown, or the mask has not two axes.
    """

    fine_hw: Tensor
    copy: str = "pixel"
    anchor: str = "centre"
    units: str = "small"

    def __post_init__(self):
        if self.anchor not in ANCHORS or self.units not in UNITS:
            raise ValueError(
                f"anchor={self.anchor!r}, units={self.units!r}: expected one of {', '.join(ANCHORS)} and one of "
                f"{', '.join(UNITS)}."
            )
        if self.fine_hw.ndim != 2 or self.fine_hw.dtype != torch.bool:
            raise ValueError(
                f"fine_hw of shape {tuple(self.fine_hw.shape)}, {self.fine_hw.dtype}: expected bool (h, w)."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Cells down and across."""
        return tuple(self.fine_hw.shape)

    @cached_property
    def coarse(self) -> Tensor:
        """Tokens of the small picture that stay, by their raster index in it."""
        return (~self.fine_hw).flatten().nonzero().flatten()

    @cached_property
    def fine(self) -> Tensor:
        """Tokens of the full picture, by their raster index in it, the four of a cell one after the other."""
        row, column = self.fine_hw.nonzero().T
        children = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=row.device)
        return (
            (2 * row[:, None] + children[:, 0]) * 2 * self.size[1] + 2 * column[:, None] + children[:, 1]
        ).flatten()

    @cached_property
    def positions_N2(self) -> Tensor:
        """Row and column of each token, float32, from the top left corner: coarse tokens, then fine ones."""
        width = self.size[1]
        coarse = torch.stack([self.coarse // width, self.coarse % width], -1) + ANCHORS[self.anchor]
        fine = torch.stack([self.fine // (2 * width), self.fine % (2 * width)], -1) / 2
        return torch.cat([coarse, fine]) * UNITS[self.units]

    def gather(self, x_BCHW: Tensor) -> Tensor:
        """The mixed sequence of a grid, (B, N, 4C): channel, row and column of the patch."""
        return torch.cat([to_tokens(reduce(x_BCHW, self.copy))[:, self.coarse], to_tokens(x_BCHW)[:, self.fine]], 1)

    def scatter(self, mixed_BND: Tensor) -> Tensor:
        """The grid (B, C, H, W) of a mixed sequence, coarse cells constant."""
        (h, w), split = self.size, len(self.coarse)
        small = mixed_BND.new_zeros(len(mixed_BND), h * w, mixed_BND.shape[-1])
        full = mixed_BND.new_zeros(len(mixed_BND), 4 * h * w, mixed_BND.shape[-1])
        small[:, self.coarse], full[:, self.fine] = mixed_BND[:, :split], mixed_BND[:, split:]
        coarse_BCHW = enlarge(to_grid(small, h, w), self.copy)
        return torch.where(on_grid(self.fine_hw[None]), to_grid(full, 2 * h, 2 * w), coarse_BCHW)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks, a family each
# ---------------------------------------------------------------------------------------------------------------------


class PackedTokens(ModelHook):
    """FLUX.1 and Qwen-Image: the pipeline gives tokens, and says where they are."""

    def __init__(self, mixed: MixedTokens):
        super().__init__()
        self.mixed = mixed

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        h, w = self.mixed.size
        image, self._rest = kwargs["hidden_states"].tensor_split([4 * h * w], 1)
        kwargs["hidden_states"] = torch.cat([self.mixed.gather(to_grid(image, 2 * h, 2 * w)), self._rest], 1)
        if kwargs.get("img_ids") is not None:
            kwargs["img_ids"] = self._ids(kwargs["img_ids"])
        if kwargs.get("img_shapes") is not None and self.mixed.units == "small":
            kwargs["img_shapes"] = [[(1, h, w), *shapes[1:]] for shapes in kwargs["img_shapes"]]
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        velocity_BND = output[0]
        mixed_BND = velocity_BND[:, : velocity_BND.shape[1] - self._rest.shape[1]]
        velocity = torch.cat([to_tokens(self.mixed.scatter(mixed_BND)), velocity_BND[:, mixed_BND.shape[1] :]], 1)
        self._rest = None
        return (velocity, *output[1:]) if isinstance(output, tuple) else type(output)(velocity)

    def _ids(self, img_ids: Tensor) -> Tensor:
        """FLUX's: the first axis tells images apart, then row and column. In float32, bfloat16 has no 127.25."""
        count = 4 * self.mixed.fine_hw.numel()
        own = torch.zeros(len(self.mixed.positions_N2), img_ids.shape[1], device=img_ids.device)
        own[:, 0], own[:, 1:3] = img_ids[0, 0], self.mixed.positions_N2.to(img_ids.device)
        return torch.cat([own, img_ids[count:].float()])


class QwenPositions(ModelHook):
    """Qwen-Image's rotations: the first picture's are those of the mixed tokens, whose origin is its middle."""

    def __init__(self, mixed: MixedTokens):
        super().__init__()
        self.mixed, self._rotations = mixed, None

    def post_forward(self, module: nn.Module, output):
        image, text = output
        count = self.mixed.fine_hw.numel() * (1 if self.mixed.units == "small" else 4)
        if self._rotations is None:
            self._rotations = self._rotate(module).to(image)
        return torch.cat([self._rotations, image[count:]]), text

    def _rotate(self, module: nn.Module) -> Tensor:
        h, w = self.mixed.size
        middle = [n - n // 2 if self.mixed.units == "small" else n for n in (h, w)]
        positions = self.mixed.positions_N2.cpu() - torch.tensor(middle)
        axes = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        rotations = [
            module.rope_params(axis, dim, module.theta)
            for axis, dim in zip(axes.unbind(1), module.axes_dim, strict=True)
        ]
        return torch.cat(rotations, 1)


class PatchedTokens(ModelHook):
    """SD3's patch embedding: takes the grid, gives the mixed tokens with their positions added."""

    def __init__(self, mixed: MixedTokens):
        super().__init__()
        self.mixed, self._positions = mixed, None

    def new_forward(self, module: nn.Module, latent: Tensor) -> Tensor:
        if self._positions is None:
            self._positions = sd3_positions(module, self.mixed).to(latent.device)
        patches = self.mixed.gather(latent).unflatten(-1, (-1, 2, 2))
        embedded_BND = module.proj(patches.flatten(0, 1)).flatten(1).unflatten(0, patches.shape[:2])
        return (embedded_BND + self._positions).to(embedded_BND.dtype)


class UnpatchedTokens(ModelHook):
    """SD3's last layer: gives a token to each place of the full grid, channels last."""

    def __init__(self, mixed: MixedTokens):
        super().__init__()
        self.mixed = mixed

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        channels_first = output.unflatten(-1, (2, 2, -1)).movedim(-1, -3).flatten(2)
        full = to_tokens(self.mixed.scatter(channels_first))
        return full.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).flatten(2)


def sd3_positions(embedder: nn.Module, mixed: MixedTokens) -> Tensor:
    """SD3's table of sines at the positions of mixed tokens, which fall between its entries: (N, D).

    Raises:
        ValueError: the table in the checkpoint is not the one that the formula gives, or the picture is too large.
    """
    table, most = embedder.pos_embed[0], embedder.pos_embed_max_size
    scale = most / embedder.base_size * embedder.interpolation_scale

    def formula(places_N2: Tensor) -> Tensor:
        across_then_down = (places_N2.float() / scale).flip(-1).T
        return get_2d_sincos_pos_embed_from_grid(table.shape[-1], across_then_down, output_type="pt")

    probe = torch.tensor([[0, 0], [most - 1, most // 3], [most // 2, most - 1]], device=table.device)
    if (formula(probe) - table[probe[:, 0] * most + probe[:, 1]]).abs().max() > 2e-3:  # half precision is 5e-4 apart
        raise ValueError(
            "The position table of this SD3 checkpoint is not the sine table of its config, and between its entries "
            "nothing is known; RALU needs positions there."
        )
    sides = [n if mixed.units == "small" else 2 * n for n in mixed.size]
    if max(sides) > most:
        raise ValueError(f"A grid of {sides[0]} x {sides[1]} tokens: the position table ends at {most}.")
    origin = torch.tensor([(most - side) // 2 for side in sides], device=mixed.positions_N2.device)
    return formula((mixed.positions_N2 + origin).to(table.device)).float()


def _flux_hooks(transformer: nn.Module, mixed: MixedTokens) -> list[tuple[nn.Module, ModelHook]]:
    return [(transformer, PackedTokens(mixed))]


def _qwen_hooks(transformer: nn.Module, mixed: MixedTokens) -> list[tuple[nn.Module, ModelHook]]:
    positions = transformer.pos_embed
    if type(positions).__name__ != "QwenEmbedRope" or not positions.scale_rope or transformer.zero_cond_t:
        raise ValueError(
            "RALU knows Qwen-Image with its centred rotations and one timestep for all tokens; this transformer has "
            f"{type(positions).__name__} and zero_cond_t={transformer.zero_cond_t}."
        )
    return [(transformer, PackedTokens(mixed)), (positions, QwenPositions(mixed))]


def _sd3_hooks(transformer: nn.Module, mixed: MixedTokens) -> list[tuple[nn.Module, ModelHook]]:
    return [(transformer.pos_embed, PatchedTokens(mixed)), (transformer.proj_out, UnpatchedTokens(mixed))]


FAMILIES = {
    "FluxTransformer2DModel": _flux_hooks,
    "QwenImageTransformer2DModel": _qwen_hooks,
    "SD3Transformer2DModel": _sd3_hooks,
}


def require_mixable(denoiser: nn.Module) -> None:
    """Raises ValueError for networks whose tokens cannot be mixed."""
    if type(denoiser).__name__ in FAMILIES:
        return
    name = type(denoiser).__name__
    if name == "OptimizedModule":
        raise ValueError(
            "RALU cannot see into a model compiled as a whole; use transformer.compile_repeated_blocks()."
        )
    why = "it has no tokens to mix" if "UNet" in name else "its tokens are not known here"
    raise ValueError(f"RALU cannot run on a {name}: {why}. It runs on {', '.join(FAMILIES)}.")


def require_positions(transformer: nn.Module, rows: int, columns: int) -> None:
    """Raises ValueError if it has no positions for mixed tokens, or none for a full picture of so many cells."""
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    FAMILIES[type(transformer).__name__](transformer, MixedTokens(cells, units="full"))
    embedder = transformer.pos_embed
    if isinstance(embedder, PatchEmbed) and not embedder.pos_embed.is_meta:  # as it is where weights are offloaded
        sd3_positions(embedder, MixedTokens(cells, units="full"))


@contextmanager
def mixed_resolution(
    transformer: nn.Module, fine_hw: Tensor, copy: str = "pixel", anchor: str = "centre", units: str = "small"
) -> Iterator[MixedTokens]:
    """Inside, the transformer evaluates the mixed sequence of the full grid that it is given.

    Args:
        transformer: of FLUX.1, Qwen-Image or SD3.
        fine_hw: which cells have the full resolution.
        copy, anchor, units: as in `MixedTokens`.

    Raises:
        ValueError: the family is not covered, or an argument is unknown.
    """
    require_mixable(transformer)
    mixed = MixedTokens(fine_hw, copy, anchor, units)
    with ExitStack() as stack:
        for module, hook in FAMILIES[type(transformer).__name__](transformer, mixed):
            stack.enter_context(hooked(module, hook, HOOK))
        yield mixed


@contextmanager
def hooked(module: nn.Module, hook: ModelHook, name: str) -> Iterator[None]:
    """Registers a hook, and afterwards takes away also what the registry leaves behind."""
    attributes = ("forward", "_diffusers_hook")
    before = [attribute for attribute in attributes if attribute in module.__dict__]
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    try:
        yield
    finally:
        module._diffusers_hook.remove_hook(name, recurse=False)
        for attribute in attributes:
            if attribute not in before:
                del module.__dict__[attribute]
