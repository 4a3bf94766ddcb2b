"""The phases of one preview: the full-size steps, the choice of an operator, the small steps.

Shape suffixes: B pictures, K candidates; latents are (B, C, H, W), of videos (B, C, T, H, W).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from solver.samplers.caches import cached, require_cache
from solver.samplers.cascade import Segment, fresh_copy, require_flow, run_segment, set_grid, sigma_grid
from solver.samplers.latents import default_size, initial_noise, latent_shape, patch_size, vae_factor
from solver.samplers.preview.checkpoint import history_names, solver_history
from solver.samplers.preview.guidance import Guidance, reevaluated
from solver.samplers.preview.options import PreviewOptions
from solver.samplers.preview.positions import strided_positions
from solver.samplers.preview.selection import (
    block_mean,
    choose,
    choose_blockwise,
    commutator,
    mean_sigma,
    norms,
    of_chosen,
    phases,
    random_selections,
    split,
    subsample,
)
from solver.scheduling_consistency_solver import ConsistencySolverScheduler

# Arguments of pipelines that count the steps of a run, or say its grid, or how many pictures it makes and which kind.
UNSUPPORTED = (
    "skip_guidance_layers", "control_guidance_start", "control_guidance_end", "sigmas", "timesteps",
    "num_images_per_prompt", "num_videos_per_prompt", "num_inference_steps", "latents", "generator", "output_type",
)  # fmt: skip


class Run(NamedTuple):
    """What all phases of one preview share."""

    pipe: DiffusionPipeline
    call: dict
    seeds: list[int]
    options: PreviewOptions
    height: int
    width: int
    full: Tensor  # (N+1,), grid of the full-size run
    small: Tensor  # (K+1,), of the small steps; the stepper may move the points between the ends
    walked: Tensor  # (K+1,), where it moves them
    solver: SchedulerMixin  # of the full-size run
    stepper: SchedulerMixin  # of the small steps
    cache: object | None
    report: dict


def begin_run(pipe, call, seeds, options, size, stepper, cache, shrinks: bool = True) -> Run:
    """Sizes, solvers and grids. Raises ValueError as `preview` says.

    Without `shrinks` the whole run stays at full size.
    """
    require_flow(pipe, pipe.scheduler)
    if refused := [name for name in UNSUPPORTED if call.get(name) is not None]:
        raise ValueError(f"{', '.join(refused)}: not in a preview, whose run is cut into several calls; leave it out.")
    require_cache(pipe, cache)
    height, width = (own if given is None else given for given, own in zip(size, default_size(pipe), strict=True))
    multiple = vae_factor(pipe) * patch_size(pipe) * (options.scale if shrinks else 1)
    if height % multiple or width % multiple:
        what = f"a preview of 1/{options.scale} the size" if shrinks else "a picture"
        raise ValueError(f"height={height}, width={width}: {what} needs multiples of {multiple}.")
    channels = latent_shape(pipe, height, width, call.get("num_frames"))[0]
    if options.gain and not len(options.gain[0]) == len(options.gain[1]) == channels:
        raise ValueError(f"gain: expected {channels} factors and offsets, one a channel.")
    shrunk = (height // options.scale, width // options.scale)
    solver = fresh_copy(pipe.scheduler)
    history_names(solver)  # raises before the work rather than after it
    full = sigma_grid(pipe, options.num_inference_steps, height, width, **call)
    native = sigma_grid(pipe, options.num_inference_steps, *shrunk, **call) if options.grid == "native" else full
    stepper = _stepper(pipe, stepper)
    small = options.small_sigmas(full, native)
    history_names(stepper)  # raises before the work, as do grids and positions
    set_grid(walker := fresh_copy(stepper), small)
    with strided_positions(pipe, options):
        pass
    if options.reevaluate and isinstance(stepper, ConsistencySolverScheduler):
        raise ValueError("reevaluate=True repeats a step, which a multistep solver would remember; use Euler.")
    report = {"chosen": None, "candidate_norms": None, "guidance_norms": [], "target_norm": None}
    report |= {"network_calls": {"full": options.full_steps, "small": options.small_evaluations}, "seconds": {}}
    walked = walker.sigmas.detach().cpu().float()
    report["sigmas"] = {"full": full.tolist(), "small": walked.tolist()}
    return Run(pipe, call, seeds, options, height, width, full, small, walked, solver, stepper, cache, report)


def _stepper(pipe: DiffusionPipeline, given: SchedulerMixin | None) -> SchedulerMixin:
    """A fresh solver of the small steps."""
    known = (FlowMatchEulerDiscreteScheduler, ConsistencySolverScheduler)
    if given is not None:
        return fresh_copy(given)
    if isinstance(pipe.scheduler, known):
        return fresh_copy(pipe.scheduler)
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=pipe.scheduler.config.num_train_timesteps)


def full_size(run: Run) -> tuple[dict, Tensor, Tensor | None, Tensor | None]:
    """The full-size steps, and the network's answer at the switch where it is needed.

    Returns:
        what a checkpoint keeps; x and u at the switch; u one step before.
    """
    options, seen = run.options, []
    shape = latent_shape(run.pipe, run.height, run.width, run.call.get("num_frames"))
    x = initial_noise(run.seeds, shape).to(run.pipe._execution_device)
    switch, stop, total = options.switch, options.full_steps, options.num_inference_steps
    exact = switch - (options.target == "extrapolated")  # from here on no forecasts of a cache

    def look(sample, sigma, sigma_next, model_output):
        seen.append((sample, model_output))
        del seen[:-2]

    with timed(run, "full size"):
        for first, end, cache in ((0, exact, run.cache), (exact, stop, None)) if run.cache else ((0, stop, None),):
            if first < end:
                segment = Segment(None, run.height, run.width, look, steps=(first, end, total))
                with cached(run.pipe, cache):
                    x = run_segment(run.pipe, x, segment, scheduler=run.solver, **run.call)
    state = {"next_step": stop, "latents": x, "history": solver_history(run.solver) if stop else {}}
    if not options.needs_velocity:
        return state, x, None, None
    return state, *seen[-1], seen[0][1] if len(seen) > 1 else None


def shrunk(run: Run, x: Tensor, velocity: Tensor | None, before: Tensor | None) -> Tensor:
    """The small steps: from x and u at the switch to the small latents."""
    options, switch = run.options, run.options.switch
    sigma = float(run.full[switch])
    slope = 0.0
    if options.target == "extrapolated" and options.is_guided:
        slope = (velocity.float() - before.float()) / (sigma - float(run.full[switch - 1]))

    def seen(now: float) -> Tensor:
        """What the network sees at full size, at a noise level below that of the switch."""
        return velocity.float() + (now - sigma) * slope

    if options.method == "mean":
        y = _mean_start(options, x, velocity, sigma)
        begin, solver = y, run.stepper

        def target(now: float) -> Tensor:
            image, noise = split(x, seen(options.scale * now / (1 + (options.scale - 1) * now)), sigma)
            return options.scale * block_mean(noise, options.scale) - _small_image(options, image)

        first = 0
    else:
        index_BHW, begin, solver, first, asked = _select(run, x, velocity)
        unit = patch_size(run.pipe) if options.unit == "tokens" else 1

        def target(now: float) -> Tensor:
            return subsample(seen(now), index_BHW, options.scale, unit)

        if first and options.guide_at_switch and options.is_guided:  # that step is done: correct where it led
            strength, difference = options.step_strengths(run.walked)[0], commutator(asked, target(sigma))
            begin = begin.float() + strength * difference
            run.report["guidance_norms"].append(norms(difference).tolist())
    return _small_steps(run, begin, solver, first, target)


def _mean_start(options: PreviewOptions, x: Tensor, velocity: Tensor | None, sigma: float) -> Tensor:
    """The mean of every block as a sample at its own noise level, σ'."""
    scale = options.scale
    if options.gain is None:
        return block_mean(x.float(), scale) / (1 - sigma + sigma / scale)
    image, noise = split(x, velocity, sigma)
    small = float(mean_sigma(torch.tensor(sigma, dtype=torch.float64), scale))
    return (1 - small) * _small_image(options, image) + small * scale * block_mean(noise, scale)


def _small_image(options: PreviewOptions, image: Tensor) -> Tensor:
    """The mean of an image's latents, with the gain."""
    mean = block_mean(image, options.scale)
    if options.gain is None:
        return mean
    channelwise = (1, -1, *[1] * (mean.ndim - 2))
    factor, offset = (torch.tensor(values).to(mean).view(channelwise) for values in options.gain)
    return mean * factor + offset


def _select(run: Run, x: Tensor, velocity: Tensor | None):
    """The operator of each picture (Eqs. 8, 9).

    Returns:
        index (B, H, W); the small latents and the solver to go on with; the step that it stands at; the small
        velocity at the switch, if the network was asked.
    """
    options, pipe = run.options, run.pipe
    unit = patch_size(pipe) if options.unit == "tokens" else 1
    size = (x.shape[-2] // unit, x.shape[-1] // unit)
    if options.candidates == "random" and options.selection != "nearest":
        index_KBHW = random_selections(run.seeds, *size, options.scale)
    else:
        index_KBHW = phases(len(x), *size, options.scale)
    if not options.asks_candidates:
        chosen = torch.zeros(len(x), dtype=torch.int64)
        if options.selection == "random":
            chosen = choose("random", index_KBHW[:, :, None].float(), run.seeds)
        index_BHW = of_chosen(index_KBHW, chosen)
        run.report["chosen"] = chosen.tolist()
        return index_BHW, subsample(x, index_BHW, options.scale, unit), run.stepper, 0, None

    ends, solvers, velocities = [], [], []
    with timed(run, "candidates"):
        for index_BHW in index_KBHW:
            end, solver, asked = _ask(run, subsample(x, index_BHW, options.scale, unit))
            ends.append(end), solvers.append(solver), velocities.append(asked)
    kept = [subsample(velocity, index_BHW, options.scale, unit) for index_BHW in index_KBHW]
    commutators_K = torch.stack([commutator(u, k) for u, k in zip(velocities, kept, strict=True)])
    run.report["candidate_norms"] = torch.stack([norms(c) for c in commutators_K], dim=1).tolist()
    if options.selection == "blockwise":
        index_BHW = choose_blockwise(commutators_K, index_KBHW, unit)
        return index_BHW, subsample(x, index_BHW, options.scale, unit), run.stepper, 0, None
    chosen = choose(options.selection, commutators_K, run.seeds)
    run.report["chosen"] = chosen.tolist()
    index_BHW = of_chosen(index_KBHW, chosen)
    if not options.reuses_winner:
        return index_BHW, subsample(x, index_BHW, options.scale, unit), run.stepper, 0, None
    solver = solvers[0]
    if isinstance(solver, ConsistencySolverScheduler):
        histories = zip(*(candidate._history for candidate in solvers), strict=True)
        solver._history = [of_chosen(torch.stack(past), chosen) for past in histories]
    return index_BHW, of_chosen(torch.stack(ends), chosen), solver, 1, of_chosen(torch.stack(velocities), chosen)


def _ask(run: Run, small: Tensor) -> tuple[Tensor, SchedulerMixin, Tensor]:
    """The first small step of a candidate: where it leads, its solver, and the network's answer."""
    answers, solver = [], fresh_copy(run.stepper)

    def look(sample, sigma, sigma_next, model_output):
        answers.append(model_output)

    grid, _ = _small_grid(run)
    segment = Segment(grid, *_small_size(run), look, steps=(0, 1, len(grid) - 1))
    with strided_positions(run.pipe, run.options):
        end = run_segment(run.pipe, small, segment, scheduler=solver, **run.call)
    return end, solver, answers[0]


def _small_steps(run: Run, begin: Tensor, solver: SchedulerMixin, first: int, target) -> Tensor:
    """The small steps from step `first` on, guided ones first."""
    grid, strengths = _small_grid(run)
    stop = len(grid) - 1
    guidance = Guidance(strengths[first:], target)
    last_guided = max((i + 1 for i, alpha in enumerate(strengths) if alpha), default=first)
    if run.options.reevaluate and last_guided > first:
        last_guided += 1  # the step after the last correction
    cut = min(max(last_guided, first), stop) if run.cache else stop
    x = begin
    with timed(run, "small"), strided_positions(run.pipe, run.options):
        for start, end, cache in ((first, cut, None), (cut, stop, run.cache)):
            if start < end:
                segment = Segment(grid, *_small_size(run), guidance, steps=(start, end, stop))
                with cached(run.pipe, cache):
                    x = run_segment(run.pipe, x, segment, scheduler=solver, **run.call)
    run.report["guidance_norms"] += [value.tolist() for value in guidance.norms]
    if run.options.is_guided:
        run.report["target_norm"] = norms(target(float(grid[0]))).tolist()
    return x


def _small_grid(run: Run) -> tuple[list[float] | Tensor, list[float]]:
    """The sigmas of the small steps and the strength of each; σ is repeated where the network is asked again."""
    strengths = run.options.step_strengths(run.walked) if run.options.is_guided else [0.0] * (len(run.small) - 1)
    if not run.options.reevaluate:
        return run.small, strengths
    return reevaluated(run.small, strengths, run.options.corrections)


def _small_size(run: Run) -> tuple[int, int]:
    return run.height // run.options.scale, run.width // run.options.scale


@contextmanager
def timed(run: Run, phase: str) -> Iterator[None]:
    """Adds the seconds inside to the report, waiting for the device at both ends."""
    wait = torch.cuda.synchronize if run.pipe._execution_device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    run.report["seconds"][phase] = time.perf_counter() - start
