"""What RALU is compared with, each from the same noise of the same seed.

    plain(pipe, prompt, seed, steps=7)                              # fewer steps of the pipeline's own grid
    naive(pipe, prompt, seed, steps=(9, 9), end=0.5)                # enlarge noisy latents, and go on
    bottleneck(pipe, prompt, seed, steps=(4, 13, 8))                # large, small, large
    unmixed(pipe, prompt, seed, schedule)                           # RALU's stages, each of one size

Each gives images, latents and its evaluations as pairs (image tokens, steps), for `cost.run_flops`. RALU's own
ablation, from predicted pictures and new noise, is `Choices(lift=True)`.

Source of Bottleneck Sampling: arXiv 2503.18940, as RALU's appendix and an independent implementation describe it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solver.samplers.cascade import sigma_grid as own_grid
from solver.samplers.latents import decode
from solver.samplers.ralu.noise import enlarge, white_noise
from solver.samplers.ralu.sampler import Choices, noised_again, prepare
from solver.samplers.ralu.schedule import Schedule, scheduler_shift, sigma_grid


class RivalResult(NamedTuple):
    """Pictures (B, 3, H, W) in [0, 1], latents (B, C, H, W), and pairs (image tokens, steps)."""

    images_BCHW: Tensor
    latents_BCHW: Tensor
    evaluations: list[tuple[int, int]]


@torch.no_grad()
def plain(pipe, prompt, seed, steps: int, height=None, width=None, scheduler=None, call=None) -> RivalResult:
    """The stock run with fewer steps. Arguments as of `ralu`."""
    run = prepare(pipe, prompt, seed, height, width, call)
    grid = own_grid(pipe, steps, run.height, run.width, **run.call)
    x, _ = run.stage(white_noise(run.generators, run.shape), grid, scheduler)
    return RivalResult(decode(pipe, x), x, [(run.tokens, steps)])


@torch.no_grad()
def naive(
    pipe, prompt, seed, steps: Sequence[int], end: float, height=None, width=None, scheduler=None, call=None
) -> RivalResult:
    """A small run to time `end`, its noisy latents enlarged as they are, and on at full size from the same sigma.

    Args:
        steps: of the small run and of the full one, both on grids of the scheduler's shift.
        end: the paper's time, in (0, 1).
        others: as of `ralu`.

    Raises:
        ValueError: as `ralu`, and for steps or an end that make no run.
    """
    if len(steps) != 2 or min(steps) < 1 or not 0 < end < 1:
        raise ValueError(f"steps={tuple(steps)}, end={end}: expected two counts of at least 1, and a time in (0, 1).")
    run = prepare(pipe, prompt, seed, height, width, call)
    shift = scheduler_shift(pipe.scheduler, run.tokens)
    x = white_noise(run.generators, run.shape)[..., ::2, ::2]
    x, _ = run.stage(x, sigma_grid(1.0, 1 - end, shift, steps[0]), scheduler)
    x, _ = run.stage(enlarge(x, "pixel"), sigma_grid(1 - end, 0.0, shift, steps[1]), scheduler)
    return RivalResult(decode(pipe, x), x, [(run.tokens // 4, steps[0]), (run.tokens, steps[1])])


@torch.no_grad()
def bottleneck(
    pipe,
    prompt,
    seed,
    steps: Sequence[int] = (4, 13, 8),
    strengths: Sequence[float] = (1.0, 0.8, 0.6),
    shifts: Sequence[float] = (9.0, 6.0, 9.0),
    height=None,
    width=None,
    scheduler=None,
    call=None,
) -> RivalResult:
    """Bottleneck Sampling: full, half and full size, each stage to the end of its own grid, then resized and noised.

    Args:
        steps: nominal, of each stage; round(strength · steps) are walked, the last ones of the stage's grid.
        strengths: how far back each stage is noised.
        shifts: of each stage's grid.
        others: as of `ralu`.

    Raises:
        ValueError: as `ralu`, and for stages that make no run.
    """
    if not len(steps) == len(strengths) == len(shifts) == 3 or strengths[0] != 1:
        raise ValueError(
            f"steps={steps}, strengths={strengths}, shifts={shifts}: expected three each, the first in full."
        )
    walked = [math.floor(strength * n + 0.5) for strength, n in zip(strengths, steps, strict=True)]
    if min(walked) < 1 or max(strengths) > 1:
        raise ValueError(f"steps={steps}, strengths={strengths}: expected strengths up to 1 that leave a step each.")
    run = prepare(pipe, prompt, seed, height, width, call)
    sizes = [run.shape[1:], [side // 2 for side in run.shape[1:]], run.shape[1:]]
    x, evaluations = None, []
    for n, count, shift, size in zip(steps, walked, shifts, sizes, strict=True):
        sigmas = sigma_grid(1.0, 0.0, shift, n)[n - count :]
        noise = white_noise(run.generators, (run.shape[0], *size))
        x = noise if x is None else _renoised(x, noise.to(x.device), sigmas[0])
        x, _ = run.stage(x, sigmas, scheduler)
        evaluations.append((run.tokens * size[0] * size[1] // (run.shape[1] * run.shape[2]), count))
    return RivalResult(decode(pipe, x), x, evaluations)


@torch.no_grad()
def unmixed(
    pipe,
    prompt,
    seed,
    schedule: Schedule,
    small: bool = True,
    height=None,
    width=None,
    scheduler=None,
    call=None,
) -> RivalResult:
    """RALU's stages and restarts without mixed sizes: the second stage is in full, the first one small or in full too.

    No rival at equal cost, but it tells apart what RALU loses: compared with RALU, what mixed sizes lose; small=False
    with small=True, what the small stage loses; `plain` with small=False, what grids and restarts lose.

    Args:
        schedule: a `Schedule`, whose ratio does nothing.
        small: whether the first stage is of half the size.
        others: as of `ralu`.

    Raises:
        ValueError: as `ralu`.
    """
    run, choices = prepare(pipe, prompt, seed, height, width, call), Choices()
    sigmas = schedule.stage_sigmas()
    x = white_noise(run.generators, run.shape)
    copied = torch.full((len(x), run.shape[1] // 4, run.shape[2] // 4), small)
    x, x0 = run.stage(x[..., ::2, ::2] if small else x, sigmas[0], scheduler)
    if small:
        x, x0 = enlarge(x, choices.copy), enlarge(x0, choices.copy)
    for k, now in enumerate((copied, torch.zeros_like(copied))):
        x = noised_again(run, x, x0, schedule, k, now.to(x.device), torch.zeros_like(now, device=x.device), choices)
        x, x0 = run.stage(x, sigmas[k + 1], scheduler)
    tokens = (run.tokens // 4 if small else run.tokens, run.tokens, run.tokens)
    return RivalResult(decode(pipe, x), x, list(zip(tokens, schedule.steps, strict=True)))


def _renoised(x_BCHW: Tensor, noise_BCHW: Tensor, sigma: float) -> Tensor:
    return (1 - sigma) * lanczos(x_BCHW, *noise_BCHW.shape[-2:]) + sigma * noise_BCHW


def lanczos(x_BCHW: Tensor, height: int, width: int, lobes: int = 3) -> Tensor:
    """Resized with a Lanczos filter, widened where the picture shrinks; weights sum to 1 at borders too."""

    def weights(source: int, target: int) -> Tensor:
        scale = max(source / target, 1.0)
        middles = (torch.arange(target) + 0.5) * source / target - 0.5
        distance = (torch.arange(source)[None] - middles[:, None]) / scale
        kernel = torch.sinc(distance) * torch.sinc(distance / lobes) * (distance.abs() < lobes)
        return (kernel / kernel.sum(1, keepdim=True)).to(x_BCHW)

    down, across = weights(x_BCHW.shape[-2], height), weights(x_BCHW.shape[-1], width)
    return torch.einsum("bchw,yh,xw->bcyx", x_BCHW, down, across)
