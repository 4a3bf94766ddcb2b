"""Translate or warp a picture while it is made: commutator-zero guidance for other operators than D.

    made = transform(pipe, "a lighthouse at dusk", 7, translate(0, 64))   # 64 pixels to the right
    made = transform(pipe, "a lighthouse at dusk", 7, warp(flow_2HW))
    made = transform(pipe, "a lighthouse at dusk", 7, warp(grid_HW2=F.affine_grid(theta_123, (1, 1, 64, 64))[0]))

At the switch the network's image x̂_0 = x - σ u and noise x̂_1 = x + (1 - σ) u are moved apart: the image is
interpolated, the noise goes by whole elements, each at most once, so that it stays white; elements that nothing moves
to get fresh noise. The moved latent runs on at the same size, for some steps corrected towards W x̂_1 - W x̂_0.

Shape suffixes: B pictures, 2 (down, right), H W of the latents.

Source: the operators of arXiv 2604.09227, Fig. 5, whose details are not public; how noise and image are moved is ours.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from solver.samplers.cascade import Segment, encoded_once, run_segment
from solver.samplers.latents import decode, generator_beside, vae_factor
from solver.samplers.preview.guidance import Guidance
from solver.samplers.preview.options import PreviewOptions
from solver.samplers.preview.phases import begin_run, full_size
from solver.samplers.preview.sampler import to_pil
from solver.samplers.preview.selection import split


class Transformed(NamedTuple):
    """A picture moved on its way.

    Attributes:
        image: a PIL picture; of a video, a list of frames.
        latents: (C, [T,] H, W), unpacked.
        report: `guidance_norms`, of u - target before each correction; `fresh`, the share of fresh noise.
    """

    image: Image.Image | list[Image.Image]
    latents: Tensor
    report: dict


def translate(down: int, right: int) -> Callable[[int, int, int], Tensor]:
    """Moves the picture by pixels; multiples of the VAE's factor move the latent without interpolation."""

    def flow(height: int, width: int, factor: int) -> Tensor:
        shift = torch.tensor([-down / factor, -right / factor])
        return shift[:, None, None].expand(2, height, width)

    return flow


def warp(flow_2HW: Tensor | None = None, *, grid_HW2: Tensor | None = None) -> Callable[[int, int, int], Tensor]:
    """Every place of the picture shows what was elsewhere; the field may have any resolution.

    Args:
        flow_2HW: how many pixels further down and right that is.
        grid_HW2: or where it is, as `torch.nn.functional.grid_sample` with `align_corners=False` takes it: (x, y) in
            [-1, 1], from the left upper corner to the right lower one.

    Raises:
        ValueError: not one of the two is given, or it has another shape.
    """
    if (flow_2HW is None) == (grid_HW2 is None):
        raise ValueError("warp: give a flow or a grid, one of them.")
    field_2HW = flow_2HW if grid_HW2 is None else grid_HW2.movedim(-1, 0)
    if field_2HW.ndim != 3 or len(field_2HW) != 2:
        raise ValueError("warp: expected a flow (2, H, W) or a grid (H, W, 2).")

    def flow(height: int, width: int, factor: int) -> Tensor:
        field = F.interpolate(field_2HW.float()[None], (height, width), mode="bilinear", align_corners=False)[0]
        if grid_HW2 is None:
            return field / factor
        size = torch.tensor([height, width])[:, None, None]
        return ((field.flip(0) + 1) * size - 1) / 2 - _positions(height, width)

    return flow


def move_image(image: Tensor, flow_2HW: Tensor) -> Tensor:
    """W x̂_0: bilinear; what lies outside continues the border. (B, C, [T,] H, W)."""
    height, width = image.shape[-2:]
    sources = _positions(height, width) + flow_2HW
    scale = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])
    grid_1HW2 = (sources.flip(0).movedim(0, -1) * scale - 1)[None].to(image)
    frames = image.flatten(1, -3)
    moved = F.grid_sample(frames, grid_1HW2.expand(len(frames), -1, -1, -1), padding_mode="border", align_corners=True)
    return moved.reshape(image.shape)


def move_noise(noise: Tensor, flow_2HW: Tensor, fresh: Tensor) -> tuple[Tensor, float]:
    """W x̂_1: every element goes to one place at most, all others get fresh noise, so white noise stays white.

    Args:
        noise: (B, C, [T,] H, W).
        flow_2HW: in elements.
        fresh: like `noise`.

    Returns:
        the moved noise, and the share of it that is fresh.
    """
    height, width = noise.shape[-2:]
    # Not round(): it sends halves to the even neighbour, and every other element of a shift by a half would be lost.
    rows, columns = (_positions(height, width) + flow_2HW + 0.5).floor().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    source_N = torch.where(inside, rows * width + columns, -1).flatten()
    in_order, place = source_N.sort(stable=True)
    first_in_order = F.pad(in_order[1:] != in_order[:-1], (1, 0), value=True) & (in_order >= 0)
    first_N = torch.zeros_like(first_in_order).scatter(0, place, first_in_order).to(noise.device)
    moved = noise.flatten(-2)[..., source_N.clamp(min=0).to(noise.device)]
    kept = torch.where(first_N, moved, fresh.to(noise).flatten(-2))
    return kept.reshape(noise.shape), 1 - first_N.float().mean().item()


@torch.no_grad()
def transform(
    pipe: DiffusionPipeline,
    prompt: str | None,
    seed: int,
    operator: Callable[[int, int, int], Tensor],
    options: PreviewOptions | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    **call,
) -> Transformed:
    """The picture of a prompt and a seed, moved by an operator at the switch.

    Args:
        pipe: a stock pipeline of a flow model.
        prompt: or None where `call` has embeddings.
        seed: of the noise, and of what is fresh.
        operator: `translate(...)` or `warp(...)`.
        options: number of steps, switch, guided steps (from the switch on), strength and whether it fades; the rest
            does not count. The paper's m and κ by default.
        height, width: of the picture, in pixels; the pipeline's own where they are None.
        call: of the pipeline.

    Raises:
        ValueError: as `preview`.
    """
    plain = {"selection": "argmin", "candidates": "random", "unit": "pixels", "gain": None, "grid": "same"}
    plain |= {"target": "frozen", "reevaluate": False, "corrections": 1, "small_steps": None, "guide_at_switch": True}
    options = replace(options or PreviewOptions(method="subsample"), method="subsample", **plain)
    call = {"prompt": prompt, **call} if prompt is not None else call
    with encoded_once(pipe):
        run = begin_run(pipe, call, [seed], options, (height, width), None, None, shrinks=False)
        _, x, velocity, _ = full_size(run)
        sigmas = run.full[options.switch :]
        sigma = float(sigmas[0])
        image, noise = split(x, velocity, sigma)
        flow_2HW = operator(*image.shape[-2:], vae_factor(pipe))
        image = move_image(image, flow_2HW)
        noise, share = move_noise(noise, flow_2HW, torch.randn(noise.shape, generator=generator_beside(seed, 2)))
        guidance = Guidance(options.step_strengths(sigmas), lambda now: noise - image)
        segment = Segment(sigmas, run.height, run.width, guidance)
        begin = (1 - sigma) * image + sigma * noise
        latents = run_segment(pipe, begin, segment, scheduler=run.stepper, **run.call)
        pictures = decode(pipe, latents)
    report = {"guidance_norms": [float(value) for value in guidance.norms], "fresh": share}
    return Transformed(to_pil(pipe, pictures)[0], latents[0], report)


def _positions(height: int, width: int) -> Tensor:
    """Row and column of every element: (2, H, W)."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
