"""RALU on a stock pipeline: a small picture, then its edges at full resolution, then all of it.

    result = ralu(pipe, "a lighthouse at dusk", seed=7, preset="4x")
    result = ralu(pipe, prompts, seeds, steps=(5, 6, 7), ends=(0.3, 0.45, 1.0), ratio=0.3)  # NT-matching for its shift
    result = ralu(pipe, prompt, 7, preset="5x", cache=TaylorSeerCacheConfig(cache_interval=3))

Each stage is a call of the pipeline as it is (`solver.samplers.cascade`); in the second one hooks on its transformer
mix large and small tokens. LoRA, quantised and offloaded models, feature caches, `torch.compile` and any solver that
the cascade can set to given sigmas work as they do without. Whatever is random comes from each picture's seed.

Source: arXiv 2507.08422. `Choices()` is what we think right, `PUBLISHED` what the public code does.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImagePipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from solver.samplers.caches import cached, require_cache
from solver.samplers.calls import is_distilled_to_few_steps
from solver.samplers.cascade import (
    Segment,
    fresh_copy,
    number_of_pictures,
    require_deterministic,
    require_flow,
    run_segment,
)
from solver.samplers.latents import (
    as_seeds,
    decode,
    default_size,
    denoiser,
    generator_beside,
    latent_shape,
    patch_size,
    seeded,
    vae_factor,
)
from solver.samplers.prompts import encoded, row_of
from solver.samplers.ralu.edges import LUMA, edge_scores, number_of_fine, select, sobel_scores
from solver.samplers.ralu.mixed_resolution import ANCHORS, UNITS, mixed_resolution, require_mixable, require_positions
from solver.samplers.ralu.noise import COPIES, enlarge, injected_noise, on_grid, reduce, white_noise
from solver.samplers.ralu.plan import as_schedule, default_preset
from solver.samplers.ralu.schedule import Schedule, restart, scheduler_shift

PIPELINES = (FluxPipeline, FluxKontextPipeline, StableDiffusion3Pipeline, QwenImagePipeline)
OTHER_STARTS = ("strength", "mask_image")  # arguments of pipelines that do not begin with noise alone
KNOWN_CHOICES = {
    "edges": ("canny", "sobel", "random"),
    "luma": LUMA,
    "copy": COPIES,
    "anchor": tuple(ANCHORS),
    "units": tuple(UNITS),
}
# Arguments of a pipeline's call that are said in another way here.
OURS = (
    *("prompt", "latents", "height", "width", "num_inference_steps", "sigmas", "timesteps", "generator"),
    *("num_images_per_prompt", "output_type", "return_dict", "max_area"),
)


@dataclass(frozen=True)
class Choices:
    """Where the public code, the paper and we differ.

    Attributes:
        edges: which cells are fine early: those with Canny edges in the decoded picture ("canny"), with gradients in
            latent space ("sobel"), or any ("random").
        luma: "full", or "clipped", which is blind to edges in the dark half.
        copy: how latents are copied: "pixel" (nearest neighbour) or "token" (whole patches, which tiles). Qwen-Image
            scales its guidance token by token: with `true_cfg_scale`, only "token" leaves copies alike, see
            `own_choices`.
        anchor: where a coarse token sits: in the "centre" of its cell, or on its top left "corner".
        units: what positions count: tokens of the "small" picture, or of the "full" one.
        scaled_noise: whether the noise of untouched tokens has variance 1 - c instead of 1.
        lift: start stages from the predicted picture and new noise instead of copies and correlated noise.
    """

    edges: str = "canny"
    luma: str = "full"
    copy: str = "pixel"
    anchor: str = "centre"
    units: str = "small"
    scaled_noise: bool = True
    lift: bool = False

    def __post_init__(self):
        for name, known in KNOWN_CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}.")


PUBLISHED = Choices(luma="clipped", copy="token", anchor="corner", scaled_noise=False)


def own_choices(pipe: DiffusionPipeline, call: dict | None = None) -> Choices:
    """`Choices()`, but for guided Qwen-Image: copies of whole tokens, see there.

    Args:
        pipe, call: as of `ralu`.
    """
    call = call or {}
    negative = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if not isinstance(pipe, QwenImagePipeline) or not negative:
        return Choices()
    scale = call.get("true_cfg_scale", inspect.signature(pipe.__call__).parameters["true_cfg_scale"].default)
    return Choices(copy="token") if scale > 1 else Choices()


def own_preset(pipe: DiffusionPipeline) -> str:
    """The preset of its family: 4x of FLUX.1 and Qwen-Image, 2x of SD3, turbo of schnell.

    That SD3.5 Large Turbo is distilled, it does not say; name its preset.
    """
    return default_preset(isinstance(pipe, StableDiffusion3Pipeline), is_distilled_to_few_steps(pipe))


class RaluResult(NamedTuple):
    """What a run leaves.

    Attributes:
        images_BCHW: float32 in [0, 1]. NaN stays NaN.
        latents_BCHW: float32, unpacked.
        fine_Bhw: which cells had the full resolution in the second stage.
        schedule: that was run.
    """

    images_BCHW: Tensor
    latents_BCHW: Tensor
    fine_Bhw: Tensor
    schedule: Schedule


@torch.no_grad()
def ralu(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None,
    seed: int | Sequence[int],
    preset: str | Schedule | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: Sequence[int] | None = None,
    ends: Sequence[float] | None = None,
    ratio: float | None = None,
    shift: float | str | None = None,
    choices: Choices | None = None,
    scheduler: SchedulerMixin | None = None,
    cache=None,
    call: dict | None = None,
) -> RaluResult:
    """Pictures in three stages, from one prompt and one seed, or from a batch of both.

    Args:
        pipe: a stock pipeline on FLUX.1 (dev, schnell, Kontext), SD3, SD3.5 or Qwen-Image. Afterwards it is as it was.
        prompt: one, or B. None where `call` has embeddings.
        seed: one a picture; the same picture whatever else is in the batch.
        preset: a name of `schedule.PRESETS`, or a `Schedule`; `own_preset` where it is None.
        height, width: in pixels, multiples of 32 for the published models; the pipeline's own where they are None.
        steps, ends: of a schedule of one's own, solved for the scheduler's real shift.
        ratio: share of cells that are fine early; the preset's where it is None.
        shift: solve the preset for this shift of the plain run, or for the scheduler's ("own"); as published if None.
        choices: see `Choices`; `own_choices` where it is None.
        scheduler: the solver within each stage, e.g. a learned one; the pipeline's own if None. Stages begin without
            history.
        cache: configuration of a feature cache of diffusers, switched on for each stage afresh. With TaylorSeer the
            last step of the first stage, whose prediction says where edges are, is evaluated in full.
        call: further arguments of the pipeline: guidance, a negative prompt, embeddings, a picture to edit.

    Raises:
        ValueError: anything that does not fit together, said before the first step: the family, sizes, stages, numbers
            of prompts and seeds, a cache that is on already, arguments in `call` that are said otherwise here.
    """
    if isinstance(shift, str) and shift != "own":
        raise ValueError(f"shift={shift!r}: expected a number, 'own' or None.")
    if not isinstance(choices, Choices | None):
        raise ValueError(f"choices={choices!r}: expected Choices(...).")
    run = prepare(pipe, prompt, seed, height, width, call)
    require_deterministic(pipe.scheduler if scheduler is None else scheduler)
    require_cache(pipe, cache)
    if shift == "own" or (steps is not None and shift is None):
        shift = scheduler_shift(pipe.scheduler, run.tokens)
    preset = own_preset(pipe) if preset is None else preset
    choices = own_choices(pipe, call) if choices is None else choices
    schedule = as_schedule(preset, steps, ends, ratio, shift)
    number_of_fine(schedule.ratio, run.tokens // 4)  # raises if it is none
    sigmas = schedule.stage_sigmas()

    small, x0 = run.stage(
        white_noise(run.generators, run.shape)[..., ::2, ::2],
        sigmas[0],
        scheduler,
        _full_at_last(cache, schedule.steps[0]),
    )
    fine = fine_cells(run, x0, schedule.ratio, choices)

    x = noised_again(run, enlarge(small, choices.copy), enlarge(x0, choices.copy), schedule, 0, fine, ~fine, choices)
    rows = [run.row(i).mixed_stage(x[i : i + 1], sigmas[1], fine[i], choices, scheduler, cache) for i in range(len(x))]
    x, x0 = (torch.cat(parts) for parts in zip(*rows, strict=True))

    x = noised_again(run, x, x0, schedule, 1, ~fine, torch.zeros_like(fine), choices)
    x, _ = run.stage(x, sigmas[2], scheduler, cache)
    return RaluResult(decode(pipe, x), x, fine, schedule)


@dataclass
class Run:
    """What the stages share: the pipeline, its call with the prompts encoded, the pictures' size and their seeds."""

    pipe: DiffusionPipeline
    call: dict
    height: int
    width: int
    generators: list[torch.Generator]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the full latents."""
        return latent_shape(self.pipe, self.height, self.width)

    @property
    def tokens(self) -> int:
        """Image tokens at full size."""
        return self.shape[1] * self.shape[2] // patch_size(self.pipe) ** 2

    def row(self, i: int) -> "Run":
        """The i-th picture alone."""
        return replace(self, call=row_of(self.call, i, len(self.generators)), generators=self.generators[i : i + 1])

    def stage(self, x_BCHW: Tensor, sigmas: Sequence[float], scheduler=None, cache=None) -> tuple[Tensor, Tensor]:
        """One stage at the size of the latents: where it ends, and the picture predicted at its last step; float32."""
        last = {}

        def predict(sample, sigma, sigma_next, model_output):
            last["x0"] = sample.float() - sigma * model_output.float()

        factor = vae_factor(self.pipe)
        size = (x_BCHW.shape[-2] * factor, x_BCHW.shape[-1] * factor)
        solver = fresh_copy(self.pipe.scheduler if scheduler is None else scheduler)
        with cached(self.pipe, cache):
            x = run_segment(self.pipe, x_BCHW, Segment(sigmas, *size, on_step=predict), solver, **self.call)
        return x.float(), last["x0"]

    def mixed_stage(self, x_BCHW, sigmas, fine_hw, choices: Choices, scheduler=None, cache=None):
        """The second stage of one picture."""
        transformer = denoiser(self.pipe)
        with mixed_resolution(transformer, fine_hw, choices.copy, choices.anchor, choices.units):
            return self.stage(x_BCHW, sigmas, scheduler, cache)


def prepare(pipe, prompt, seed, height=None, width=None, call: dict | None = None) -> Run:
    """Checks a request, and encodes its prompts once for all stages.

    Args and Raises: as in `ralu`.
    """
    transformer = denoiser(pipe)
    require_mixable(transformer)
    require_flow(pipe, pipe.scheduler)
    require_deterministic(pipe.scheduler)
    if pipe.components.get("controlnet") is not None:
        raise ValueError(f"{type(pipe).__name__}: a ControlNet answers for the full grid, RALU's tokens are mixed.")
    takes = inspect.signature(pipe.__call__).parameters
    if not isinstance(pipe, PIPELINES) or any(name in takes for name in OTHER_STARTS):
        raise ValueError(
            f"{type(pipe).__name__}: RALU begins with noise and a prompt. Take the text-to-image pipeline of the same "
            f"model, one of {', '.join(known.__name__ for known in PIPELINES)}."
        )
    require_cache(pipe, None)
    if patch_size(pipe) != 2:
        raise ValueError(f"Tokens of {patch_size(pipe)} x {patch_size(pipe)} latents: RALU is made for 2 x 2.")
    own_height, own_width = default_size(pipe)
    height, width = own_height if height is None else height, own_width if width is None else width
    multiple = 2 * vae_factor(pipe) * patch_size(pipe)
    whole = isinstance(height, Integral) and isinstance(width, Integral)
    if not whole or height % multiple or width % multiple or min(height, width) <= 0:
        raise ValueError(
            f"height={height}, width={width}: RALU needs positive multiples of {multiple}, twice a token."
        )
    require_positions(transformer, height // multiple, width // multiple)
    call, seeds = _picture_call(prompt, seed, dict(call or {}))
    return Run(pipe, encoded(pipe, call), height, width, [seeded(one) for one in seeds])


def fine_cells(run: Run, x0_BChw: Tensor, ratio: float, choices: Choices) -> Tensor:
    """Which cells get the full resolution early, from the small picture as predicted: boolean (B, h, w)."""
    if choices.edges == "canny":
        scores = edge_scores(decode(run.pipe, x0_BChw), choices.luma, patch_size(run.pipe) * vae_factor(run.pipe))
    elif choices.edges == "sobel":
        scores = sobel_scores(x0_BChw)
    else:
        cells = (x0_BChw.shape[-2] // 2, x0_BChw.shape[-1] // 2)
        beside = [generator_beside(generator.initial_seed()) for generator in run.generators]  # the noise stays
        scores = torch.stack([torch.rand(cells, generator=generator) for generator in beside])
    return select(scores.to(x0_BChw.device), ratio)


def noised_again(run: Run, x, x0, schedule: Schedule, k: int, copied, still_coarse, choices: Choices) -> Tensor:
    """Between stages k and k+1: copies get the noise that takes them back to the next start.

    `copied` cells get the full resolution now, `still_coarse` ones stay one token: boolean (B, h, w).
    """
    s, a, b = restart(schedule.ends[k], schedule.Z)
    noise = white_noise(run.generators, run.shape).to(x.device)
    if choices.lift:
        coarse = enlarge(reduce(noise, choices.copy), choices.copy)
        return s * x0 + (1 - s) * torch.where(on_grid(still_coarse), coarse, noise)
    z = injected_noise(noise, copied, still_coarse, schedule.c, choices.copy, choices.scaled_noise)
    return a * x + b * z


def _picture_call(prompt, seed, call: dict) -> tuple[dict, list[int]]:
    """The call with its prompts in it, a list, and one seed a picture."""
    if ours := [name for name in OURS if name in call]:
        raise ValueError(f"call has {', '.join(ours)}, which ralu() says itself: by prompt, seed, size and schedule.")
    if prompt is not None:
        call["prompt"] = [prompt] if isinstance(prompt, str) else list(prompt)
    pictures = number_of_pictures(call)
    seeds = as_seeds(seed)
    if len(seeds) != pictures or not pictures:
        raise ValueError(f"{pictures} prompts and {len(seeds)} seeds: expected one seed a prompt, and at least one.")
    return call, seeds


# ---------------------------------------------------------------------------------------------------------------------
# Feature caches, once a stage
# ---------------------------------------------------------------------------------------------------------------------


def _full_at_last(cache, steps: int):
    """The configuration with which the last step of a stage is evaluated in full; of TaylorSeer, others cannot say."""
    if not isinstance(cache, TaylorSeerCacheConfig):
        return cache
    after = cache.disable_cache_after_step
    return replace(cache, disable_cache_after_step=steps - 1 if after is None else min(after, steps - 1))
