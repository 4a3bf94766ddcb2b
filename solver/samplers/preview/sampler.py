"""`preview` and `refine`, as cascades of stock pipeline calls.

Shape suffixes: B pictures, K candidates; latents are (B, C, H, W), of videos (B, C, T, H, W).
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor

from solver.samplers.cascade import (
    Segment,
    encoded_once,
    fresh_copy,
    number_of_pictures,
    require_flow,
    run_segment,
    set_grid,
    sigma_grid,
)
from solver.samplers.latents import (
    as_seeds,
    decode,
    default_size,
    denoiser,
    initial_noise,
    is_video,
    latent_shape,
    patch_size,
    vae_factor,
)
from solver.samplers.preview.checkpoint import (
    Checkpoint,
    fingerprint,
    history_names,
    restore,
    row_of_history,
    solver_history,
)
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


class Preview(NamedTuple):
    """A small picture, and where its large one goes on.

    Attributes:
        image: a PIL picture; of a video, a list of frames.
        latents: (C, [T,] H, W), unpacked.
        checkpoint: for `refine`.
        report: what happened, in plain JSON values: `chosen` (candidate), `candidate_norms`, `guidance_norms` (of
            u - target before each correction), `target_norm`, `network_calls` and `seconds` by phase, `sigmas`.
    """

    image: Image.Image | list[Image.Image]
    latents: Tensor
    checkpoint: Checkpoint
    report: dict


class _Run(NamedTuple):
    """What all phases of one preview share."""

    pipe: DiffusionPipeline
    call: dict
    seeds: list[int]
    options: PreviewOptions
    height: int
    width: int
    full: Tensor  # (N+1,), grid of the full-size run
    small: Tensor  # (K+1,), of the small steps
    solver: SchedulerMixin  # of the full-size run
    stepper: SchedulerMixin  # of the small steps
    cache: object | None
    report: dict


@torch.no_grad()
def preview(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None,
    seed: int | Sequence[int],
    options: PreviewOptions | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    stepper: SchedulerMixin | None = None,
    cache: object | None = None,
    **call,
) -> Preview | list[Preview]:
    """A preview of the picture that the pipeline makes of a prompt and a seed.

    Args:
        pipe: a stock pipeline of a rectified-flow model: FLUX, SD3, Qwen-Image, Wan, HunyuanVideo and their kin. LoRA,
            quantisation and offloading stay as they are.
        prompt: one, or one a picture; None where `call` has embeddings instead.
        seed: one, or one a picture. A full-size run of the pipeline starts from
            `pack(pipe, initial_noise([seed], shape))`.
        options: the paper's setting by default.
        height, width: of the full-size picture, in pixels; the pipeline's own where they are None.
        stepper: solver of the small steps, a `FlowMatchEulerDiscreteScheduler` or a `ConsistencySolverScheduler`; by
            default the pipeline's own where it is one of these, else Euler. It starts without history at the switch.
        cache: config of a feature cache, such as `TaylorSeerCacheConfig`. It is on in the unguided steps, apart for
            each size; at the switch, for the candidates and in guided steps the network is evaluated in full.
        call: of the pipeline: guidance, negative prompts, frames, an image to edit.

    Returns:
        a `Preview`, or a list where there are several prompts or seeds. Pictures of one batch are computed together:
        their checkpoints, refined together, are the uninterrupted run of that batch.

    Raises:
        ValueError: a size that does not shrink by the factor into whole tokens, a seed beyond 64 bits, another number
            of seeds than of prompts, a model that is no flow model, an option the model does not have, a cache that is
            on already, pixels that are not finite.
    """
    options = options or PreviewOptions()
    seeds = as_seeds(seed)
    call = {"prompt": prompt, **call} if prompt is not None else call
    if number_of_pictures(call) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds for {number_of_pictures(call)} prompts: expected one seed a prompt.")
    with ExitStack() as stack:
        stack.enter_context(encoded_once(pipe))
        run = _begin(pipe, call, seeds, options, (height, width), stepper, cache)
        state, x, velocity, before = _full_size(run)
        small = _shrunk(run, x, velocity, before)
        with _timed(run, "decoding"):
            pictures = decode(pipe, small)
    images = to_pil(pipe, pictures)
    made_by = fingerprint(pipe)
    previews = [
        Preview(images[b], small[b], _checkpoint(run, state, made_by, b), _row_of_report(run, b))
        for b in range(len(seeds))
    ]
    return previews if isinstance(seed, Iterable) else previews[0]


@torch.no_grad()
def refine(
    pipe: DiffusionPipeline,
    checkpoint: Checkpoint | Sequence[Checkpoint],
    *,
    output_type: str = "pil",
    other_versions: bool = False,
    **call,
):
    """The full-size picture of a preview: its run goes on where it was left.

    On the same device it is the uninterrupted run, bit for bit, for the batch that the preview was made in, and if no
    feature cache was on.

    Args:
        pipe: the pipeline that made the preview, with the scheduler it had.
        checkpoint: of one picture, or of several of one run.
        output_type: `"pil"`, or `"latent"` for unpacked latents (B, C, [T,] H, W).
        other_versions: go on although torch or diffusers are of another version, which may change the last bits.
        call: what could not be written to the checkpoint (an image to edit); nothing else.

    Returns:
        a PIL picture or a list of them, as there were checkpoints; of videos, lists of frames.

    Raises:
        ValueError: the checkpoint is of another pipeline, other weights or another scheduler, needs an argument that
            is not given, the checkpoints are of different runs, or pixels are not finite.
    """
    several = not isinstance(checkpoint, Checkpoint)
    checkpoints = list(checkpoint) if several else [checkpoint]
    first = checkpoints[0]
    if set(call) != set(first.missing):
        raise ValueError(f"The checkpoint needs {first.missing or 'no arguments'} again, but got {sorted(call)}.")
    found = fingerprint(pipe)
    for one in checkpoints:
        one.check(found, other_versions)
    call = {**_joined_call(checkpoints, pipe._execution_device), **call}
    solver = fresh_copy(pipe.scheduler)
    with encoded_once(pipe):
        sigmas = sigma_grid(pipe, first.num_inference_steps, first.height, first.width, scheduler=solver, **call)
        for one in checkpoints:
            one.check_grid(sigmas)
        latents = torch.stack([one.latents for one in checkpoints]).to(pipe._execution_device)
        if first.next_step:
            restore(solver, checkpoints, pipe._execution_device)
        steps = (first.next_step, first.num_inference_steps, first.num_inference_steps)
        segment = Segment(None, first.height, first.width, steps=steps)
        latents = run_segment(pipe, latents, segment, scheduler=solver, **call)
    if output_type == "latent":
        return latents
    images = to_pil(pipe, decode(pipe, latents))
    return images if several else images[0]


def to_pil(pipe: DiffusionPipeline, pictures: Tensor) -> list:
    """What `decode` answers as PIL pictures; of videos, a list of frames each.

    Raises:
        ValueError: a pixel is NaN or infinite, and would be black.
    """
    if not pictures.isfinite().all():
        raise ValueError("The picture has NaN or infinite pixels: take a smaller kappa or alpha, or float32.")
    if is_video(pipe):
        return [to_frames(pipe.video_processor, video) for video in pictures]
    return to_frames(pipe.image_processor, pictures)


def to_frames(processor, pictures_BCHW: Tensor) -> list[Image.Image]:
    return processor.numpy_to_pil(processor.pt_to_numpy(pictures_BCHW))


# ---------------------------------------------------------------------------------------------------------------------
# Phases
# ---------------------------------------------------------------------------------------------------------------------


def _begin(pipe, call, seeds, options, size, stepper, cache) -> _Run:
    """Sizes, solvers and grids. Raises ValueError as `preview` says."""
    require_flow(pipe, pipe.scheduler)
    if getattr(denoiser(pipe), "is_cache_enabled", False):
        raise ValueError("A feature cache is on; call disable_cache() and pass cache=, so that it changes size too.")
    height, width = (own if given is None else given for given, own in zip(size, default_size(pipe), strict=True))
    multiple = options.scale * vae_factor(pipe) * patch_size(pipe)
    if height % multiple or width % multiple:
        raise ValueError(
            f"height={height}, width={width}: a preview of 1/{options.scale} the size needs multiples of {multiple}."
        )
    shrunk = (height // options.scale, width // options.scale)
    solver = fresh_copy(pipe.scheduler)
    history_names(solver)  # raises before the work rather than after it
    full = sigma_grid(pipe, options.num_inference_steps, height, width, **call)
    native = sigma_grid(pipe, options.num_inference_steps, *shrunk, **call) if options.grid == "native" else full
    stepper = _stepper(pipe, stepper)
    small = options.small_sigmas(full, native)
    set_grid(fresh_copy(stepper), small)  # raises before the work, as do positions
    with strided_positions(pipe, options):
        pass
    if options.reevaluate and isinstance(stepper, ConsistencySolverScheduler):
        raise ValueError("reevaluate=True repeats a step, which a multistep solver would remember; use Euler.")
    report = {"chosen": None, "candidate_norms": None, "guidance_norms": [], "target_norm": None}
    report |= {"network_calls": {"full": options.full_steps, "small": options.small_evaluations}, "seconds": {}}
    report["sigmas"] = {"full": full.tolist(), "small": small.tolist()}
    return _Run(pipe, call, seeds, options, height, width, full, small, solver, stepper, cache, report)


def _stepper(pipe: DiffusionPipeline, given: SchedulerMixin | None) -> SchedulerMixin:
    """A fresh solver of the small steps."""
    known = (FlowMatchEulerDiscreteScheduler, ConsistencySolverScheduler)
    if given is not None:
        return fresh_copy(given)
    if isinstance(pipe.scheduler, known):
        return fresh_copy(pipe.scheduler)
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=pipe.scheduler.config.num_train_timesteps)


def _full_size(run: _Run) -> tuple[dict, Tensor, Tensor | None, Tensor | None]:
    """The full-size steps, and the network's answer at the switch where it is needed.

    Returns:
        what a checkpoint keeps; x and u at the switch; u one step before.
    """
    options, seen = run.options, []
    shape = latent_shape(run.pipe, run.height, run.width, run.call.get("num_frames"))
    x = initial_noise(run.seeds, shape).to(run.pipe._execution_device)
    switch, stop, total = options.switch, options.full_steps, options.num_inference_steps

    def look(sample, sigma, sigma_next, model_output):
        seen.append((sample, model_output))
        del seen[:-2]

    with _timed(run, "full size"):
        for first, end, cache in ((0, switch, run.cache), (switch, stop, None)) if run.cache else ((0, stop, None),):
            if first < end:
                segment = Segment(None, run.height, run.width, look, steps=(first, end, total))
                with cached(run.pipe, cache):
                    x = run_segment(run.pipe, x, segment, scheduler=run.solver, **run.call)
    state = {"next_step": stop, "latents": x, "history": solver_history(run.solver) if stop else {}}
    if not options.needs_velocity:
        return state, x, None, None
    return state, *seen[-1], seen[0][1] if len(seen) > 1 else None


def _shrunk(run: _Run, x: Tensor, velocity: Tensor | None, before: Tensor | None) -> Tensor:
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
            strength = options.step_strengths(run.small)[0]
            begin = begin.float() + strength * commutator(asked, target(sigma))
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
    if len(options.gain[0]) != mean.shape[1] or len(options.gain[1]) != mean.shape[1]:
        raise ValueError(f"gain: expected {mean.shape[1]} factors and offsets, one a channel.")
    factor, offset = (torch.tensor(values).to(mean).view(channelwise) for values in options.gain)
    return mean * factor + offset


def _select(run: _Run, x: Tensor, velocity: Tensor | None):
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
    with _timed(run, "candidates"):
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


def _ask(run: _Run, small: Tensor) -> tuple[Tensor, SchedulerMixin, Tensor]:
    """The first small step of a candidate: where it leads, its solver, and the network's answer."""
    answers, solver = [], fresh_copy(run.stepper)

    def look(sample, sigma, sigma_next, model_output):
        answers.append(model_output)

    grid, _ = _small_grid(run)
    segment = Segment(grid, *_small_size(run), look, steps=(0, 1, len(grid) - 1))
    with strided_positions(run.pipe, run.options):
        end = run_segment(run.pipe, small, segment, scheduler=solver, **run.call)
    return end, solver, answers[0]


def _small_steps(run: _Run, begin: Tensor, solver: SchedulerMixin, first: int, target) -> Tensor:
    """The small steps from step `first` on, guided ones first."""
    grid, strengths = _small_grid(run)
    stop = len(grid) - 1
    guidance = Guidance(strengths[first:], target)
    last_guided = max((i + 1 for i, alpha in enumerate(strengths) if alpha), default=first)
    if run.options.reevaluate and last_guided > first:
        last_guided += 1  # the step after the last correction
    cut = min(max(last_guided, first), stop) if run.cache else stop
    x = begin
    with _timed(run, "small"), strided_positions(run.pipe, run.options):
        for start, end, cache in ((first, cut, None), (cut, stop, run.cache)):
            if start < end:
                segment = Segment(grid, *_small_size(run), guidance, steps=(start, end, stop))
                with cached(run.pipe, cache):
                    x = run_segment(run.pipe, x, segment, scheduler=solver, **run.call)
    run.report["guidance_norms"] = [value.tolist() for value in guidance.norms]
    if run.options.is_guided:
        run.report["target_norm"] = norms(target(float(grid[0]))).tolist()
    return x


def _small_grid(run: _Run) -> tuple[list[float] | Tensor, list[float]]:
    """The sigmas of the small steps and the strength of each; σ is repeated where the network is asked again."""
    strengths = run.options.step_strengths(run.small) if run.options.is_guided else [0.0] * (len(run.small) - 1)
    if not run.options.reevaluate:
        return run.small, strengths
    return reevaluated(run.small, strengths, run.options.corrections)


def _small_size(run: _Run) -> tuple[int, int]:
    return run.height // run.options.scale, run.width // run.options.scale


# ---------------------------------------------------------------------------------------------------------------------
# Around the phases
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def cached(pipe: DiffusionPipeline, cache: object | None) -> Iterator[None]:
    """Inside, the denoiser has a feature cache, empty at first; with None, nothing."""
    if cache is None:
        yield
        return
    denoiser(pipe).enable_cache(cache)
    try:
        yield
    finally:
        denoiser(pipe).disable_cache()


@contextmanager
def _timed(run: _Run, phase: str) -> Iterator[None]:
    """Adds the seconds inside to the report, waiting for the device at both ends."""
    wait = torch.cuda.synchronize if run.pipe._execution_device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    run.report["seconds"][phase] = time.perf_counter() - start


def _checkpoint(run: _Run, state: dict, made_by: dict, row: int) -> Checkpoint:
    """Where the full-size run of one picture was left."""
    history, numbers = row_of_history(state["history"], row)
    call, missing = _row_of_call(run.call, row, len(run.seeds))
    return Checkpoint(
        next_step=state["next_step"],
        num_inference_steps=run.options.num_inference_steps,
        height=run.height,
        width=run.width,
        sigmas=run.full.tolist(),
        latents=state["latents"][row],
        history=history,
        numbers=numbers,
        call=call,
        missing=missing,
        made_by=made_by,
        seed=run.seeds[row],
    )


def _row_of_call(call: dict, row: int, batch_size: int) -> tuple[dict, list[str]]:
    """The call for one picture of a batch, and the names of what no file can hold."""
    kept, missing = {}, []
    for name, value in call.items():
        if isinstance(value, Tensor):
            kept[name] = value[row : row + 1] if len(value) == batch_size else value
        elif isinstance(value, list | tuple) and len(value) == batch_size and name.endswith(("prompt", "_2", "_3")):
            kept[name] = [value[row]]
        elif isinstance(value, str | int | float | bool | None):
            kept[name] = [value] if isinstance(value, str) and name.startswith("prompt") else value
        else:
            missing.append(name)
    return kept, missing


def _joined_call(checkpoints: list[Checkpoint], device: torch.device) -> dict:
    """The call for several pictures of one run, from files or not. Raises ValueError if they are of different runs."""
    first = checkpoints[0]
    same = ("next_step", "num_inference_steps", "height", "width", "sigmas", "missing")
    for one in checkpoints[1:]:
        if differing := [name for name in same if getattr(one, name) != getattr(first, name)]:
            raise ValueError(f"The checkpoints differ in {', '.join(differing)}; refine them one by one.")
        if _alike(one.call) != _alike(first.call):
            raise ValueError(
                f"The checkpoints are of calls that differ: {_alike(first.call)}, {_alike(one.call)}; refine them one "
                "by one."
            )
    joined = {}
    for name, value in first.call.items():
        if isinstance(value, Tensor):
            joined[name] = torch.cat([one.call[name] for one in checkpoints]).to(device)
        elif isinstance(value, list):
            joined[name] = [item for one in checkpoints for item in one.call[name]]
        else:
            joined[name] = value
    return joined


def _alike(call: dict) -> dict:
    """What the pictures of a batch share: numbers and texts by value, of tensors and lists that there are some."""
    return {name: "one each" if isinstance(value, Tensor | list) else value for name, value in call.items()}


def _row_of_report(run: _Run, row: int) -> dict:
    """The report of one picture."""
    report = {**run.report, "guidance_norms": [step[row] for step in run.report["guidance_norms"]]}
    for name in ("chosen", "candidate_norms", "target_norm"):
        if report[name] is not None:
            report[name] = report[name][row]
    return report
