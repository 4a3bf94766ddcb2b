"""`preview` and `refine`, as cascades of stock pipeline calls.

Shape suffixes: B pictures; latents are (B, C, H, W), of videos (B, C, T, H, W).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor

from solver.samplers.caches import cached, require_cache
from solver.samplers.cascade import Segment, encoded_once, fresh_copy, number_of_pictures, run_segment, sigma_grid
from solver.samplers.latents import as_seeds, decode, is_video
from solver.samplers.preview.checkpoint import (
    Checkpoint,
    fingerprint,
    joined_call,
    restore,
    row_of_call,
    row_of_history,
)
from solver.samplers.preview.options import PreviewOptions
from solver.samplers.preview.phases import Run, begin_run, full_size, shrunk, timed


class Preview(NamedTuple):
    """A small picture, and where its large one goes on.

    Attributes:
        image: a PIL picture; of a video, a list of frames.
        latents: (C, [T,] H, W), unpacked.
        checkpoint: for `refine`.
        report: what happened, in plain JSON values: `chosen` (candidate) and `candidate_norms`, None of the mean;
            `guidance_norms` (of u - target before each correction), `target_norm`, `network_calls` and `seconds` by
            phase, `sigmas`.
    """

    image: Image.Image | list[Image.Image]
    latents: Tensor
    checkpoint: Checkpoint
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
        options: those of `PreviewOptions()` by default.
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
            on already or would do nothing, pixels that are not finite.
    """
    options = options or PreviewOptions()
    seeds = as_seeds(seed)
    call = {"prompt": prompt, **call} if prompt is not None else call
    if not seeds:
        raise ValueError("There are no prompts and no seeds.")
    if number_of_pictures(call) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds for {number_of_pictures(call)} prompts: expected one seed a prompt.")
    with encoded_once(pipe):
        run = begin_run(pipe, call, seeds, options, (height, width), stepper, cache)
        state, x, velocity, before = full_size(run)
        small = shrunk(run, x, velocity, before)
        with timed(run, "decoding"):
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
    cache: object | None = None,
    **call,
):
    """The full-size picture of a preview: its run goes on where it was left.

    On the same device it is the uninterrupted run, bit for bit, for the batch that the preview was made in, and if no
    feature cache was or is on.

    Args:
        pipe: the pipeline that made the preview, with the scheduler it had.
        checkpoint: of one picture, or of several of one run.
        output_type: `"pil"`, or `"latent"` for unpacked latents (B, C, [T,] H, W).
        other_versions: go on although torch or diffusers are of another version, which may change the last bits.
        cache: config of a feature cache for the steps that are left. It begins empty, whatever the preview had.
        call: what could not be written to the checkpoint, such as a function; nothing else.

    Returns:
        a PIL picture or a list of them, as there were checkpoints; of videos, lists of frames.

    Raises:
        ValueError: the checkpoint is of another pipeline, other weights or another scheduler, needs an argument that
            is not given, the checkpoints are of different runs, a cache is on already or would do nothing, or pixels
            are not finite.
    """
    several = not isinstance(checkpoint, Checkpoint)
    checkpoints = list(checkpoint) if several else [checkpoint]
    if not checkpoints:
        raise ValueError("There are no checkpoints.")
    first = checkpoints[0]
    if output_type not in ("pil", "latent"):
        raise ValueError(f"output_type={output_type!r}: expected 'pil' or 'latent'.")
    if set(call) != set(first.missing):
        raise ValueError(f"The checkpoint needs {first.missing or 'no arguments'} again, but got {sorted(call)}.")
    require_cache(pipe, cache)
    found = fingerprint(pipe)
    for one in checkpoints:
        one.check(found, other_versions)
    call = {**joined_call(checkpoints, pipe._execution_device), **call}
    solver = fresh_copy(pipe.scheduler)
    with encoded_once(pipe):
        sigmas = sigma_grid(pipe, first.num_inference_steps, first.height, first.width, scheduler=solver, **call)
        for one in checkpoints:
            one.check_grid(sigmas)
        latents = torch.stack([one.latents for one in checkpoints]).to(pipe._execution_device)
        if first.next_step:
            restore(solver, checkpoints, pipe._execution_device)
        steps = (first.next_step, first.num_inference_steps, first.num_inference_steps)
        if first.next_step < first.num_inference_steps:  # else the preview has walked the last step already
            segment = Segment(None, first.height, first.width, steps=steps)
            with cached(pipe, cache):
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


def _checkpoint(run: Run, state: dict, made_by: dict, row: int) -> Checkpoint:
    """Where the full-size run of one picture was left."""
    history, numbers = row_of_history(state["history"], row)
    call, missing = row_of_call(run.call, row, len(run.seeds))
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


def _row_of_report(run: Run, row: int) -> dict:
    """The report of one picture."""
    report = {**run.report, "guidance_norms": [step[row] for step in run.report["guidance_norms"]]}
    for name in ("chosen", "candidate_norms", "target_norm"):
        if report[name] is not None:
            report[name] = report[name][row]
    return report
