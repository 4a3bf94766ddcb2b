"""Few tokens first in the last stage: one for four where the smaller picture is smooth. An experiment, ours.

    fine_Bhw = edge_cells(image_BCHW, height, width, pixels=16, ratio=0.3)
    with edges_first(pipe.transformer, fine_Bhw[0], lambda: (anchor_1CHW, s)):
        x_1CHW = run_segment(pipe, x_1CHW, segment, **call)

The last stage is most of a cascade's cost, and where the smaller picture is smooth it has little to add. This takes
RALU's tokens (`solver.samplers.ralu`, arXiv 2507.08422) and leaves out its restart: the state stays a full grid with
white noise in every latent. With A the clean image that the step before led to, the state is x = (1-s) A + s ε, and a
mean of 2 x 2 latents (a bar) has noise of half the deviation. So a coarse latent is shown as

    y = (1-s) Ā + 2 s ε̄,

which at the first step has exactly the noise that the network expects, and what it sees there, Y = y - s v, moves A as
a whole: X = A + Y - Ā. The velocity that the solver gets is (x - X) / s.

Later, ε is the noise as seen from A, no longer the one that was drawn: what the picture has become since the start
counts in it, and is shown too weak. With the drawn noise instead, earlier weights of zoo/mini-flux were further from
the pictures with all tokens, by 0.7 to 1.3 dB on a few prompts, so the damping stays.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from solver.samplers.latents import to_grid, to_tokens
from solver.samplers.ralu.edges import edge_scores, select
from solver.samplers.ralu.mixed_resolution import MixedTokens, hooked, mixed_resolution
from solver.samplers.ralu.noise import enlarge, on_grid

COPY = "pixel"


def edge_cells(images_BCHW: Tensor, height: int, width: int, pixels: int, ratio: float) -> Tensor:
    """The cells of 2 x 2 tokens with the most edges, boolean (B, h, w).

    Args:
        images_BCHW: the smaller pictures, in [0, 1]; edges are looked for at half the stage's size.
        height, width: of the stage.
        pixels: side of a token.
        ratio: share of the cells, in (0, 1).
    """
    half = height // 2, width // 2
    if tuple(images_BCHW.shape[-2:]) != half:
        images_BCHW = F.interpolate(images_BCHW, half, mode="bilinear", antialias=True)
    return select(edge_scores(images_BCHW.clamp(0, 1), "full", pixels), ratio)


@contextmanager
def edges_first(
    transformer: nn.Module, fine_hw: Tensor, here: Callable[[], tuple[Tensor, float]]
) -> Iterator[MixedTokens]:
    """Inside, a FLUX-type transformer sees four tokens of a fine cell and one of a coarse cell.

    Args:
        transformer: its condition image, if there is one, keeps its tokens.
        fine_hw: which cells are fine.
        here: is asked for A (1, C, H, W) and s at each evaluation.
    """
    with ExitStack() as stack:
        mixed = stack.enter_context(mixed_resolution(transformer, fine_hw, COPY, units="full"))
        stack.enter_context(hooked(transformer, AnchoredCells(mixed, here), "hiflow_edges_first"))
        yield mixed


class AnchoredCells(ModelHook):
    """Shows coarse cells as a smaller picture at the same noise level, and takes the answer back to the full grid."""

    def __init__(self, mixed: MixedTokens, here: Callable[[], tuple[Tensor, float]]):
        super().__init__()
        self.mixed, self.here = mixed, here

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        h, w = self.mixed.size
        packed, rest = kwargs["hidden_states"].tensor_split([4 * h * w], 1)
        anchor, self._s = self.here()
        self._anchor = anchor.to(packed.device, torch.float32)
        self._x = to_grid(packed, 2 * h, 2 * w).float()
        self._y = cell_means((1 - self._s) * self._anchor + 2 * (self._x - (1 - self._s) * self._anchor))
        shown = torch.where(self._is_fine(), self._x, self._y)
        kwargs["hidden_states"] = torch.cat([to_tokens(shown).to(packed.dtype), rest], 1)
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        h, w = self.mixed.size
        packed, rest = output[0].tensor_split([4 * h * w], 1)
        v = to_grid(packed, 2 * h, 2 * w).float()
        seen = self._y - self._s * v
        moved = self._anchor + seen - cell_means(self._anchor)
        velocity = torch.where(self._is_fine(), v, (self._x - moved) / self._s)
        self._anchor = self._x = self._y = None
        packed = torch.cat([to_tokens(velocity).to(packed.dtype), rest], 1)
        return (packed, *output[1:]) if isinstance(output, tuple) else type(output)(packed)

    def _is_fine(self) -> Tensor:
        return on_grid(self.mixed.fine_hw[None]).to(self._x.device)


def cell_means(x_BCHW: Tensor) -> Tensor:
    """The mean of each 2 x 2 latents in their place, (B, C, H, W)."""
    return enlarge(F.avg_pool2d(x_BCHW, 2), COPY)
