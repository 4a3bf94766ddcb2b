"""One picture at a time: what the `solver` and `refine` commands of `sample.py` do with their arguments."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from data.build_config import PUBLISHED_SCHEDULER, PUBLISHED_SCHEDULER_KWARGS
from data.noise import initial_noise
from data.prompts import source_picture
from data.teacher import make_scheduler
from evaluation.rendering import NotFiniteError
from evaluation.solvers import is_flow, load_solver
from solver import ConsistencySolverScheduler
from solver.samplers.calls import encode_sources, guidance, text_length
from solver.samplers.cascade import call_at_size
from solver.samplers.latents import decode, default_size, latent_shape, pack, unpack

PREFIX = "proofsheet:"  # of our text chunks in a PNG
NUMBERS = {"seed": int, "steps": int, "height": int, "width": int, "guidance_scale": float}


def solver_scheduler(path: str, own: SchedulerMixin, guidance_scale: float | None) -> ConsistencySolverScheduler:
    """A learned solver for a pipeline with the scheduler `own`.

    Args:
        path: solver folder or hub id.
        own: the pipeline's scheduler.
        guidance_scale: which the solver is told; None leaves it its own.

    Raises:
        OSError: there is no solver, or it has no weights.
        ValueError: it belongs to another noise schedule, or is baked for another guidance scale.
    """
    solver = load_solver(path, own)
    if guidance_scale is not None:
        solver.guidance_scale = guidance_scale
    return solver


def full_scheduler(name: str | None, own: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of full-step pictures: by name, else that of the offline dataset, else a flow model's own.

    Raises:
        ValueError: there is no such scheduler, it draws noise of its own, or it is of another kind of model.
    """
    if name is None and is_flow(own):
        return own
    name = name or PUBLISHED_SCHEDULER
    return make_scheduler(name, PUBLISHED_SCHEDULER_KWARGS if name == PUBLISHED_SCHEDULER else {}, own)


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    image: str = "",
    negative_prompt: str = "",
) -> Image.Image:
    """The picture of a prompt and a seed: that of `evaluate.py` and of the offline dataset.

    Args:
        pipe: with the scheduler to use.
        prompt, negative_prompt, seed, steps, guidance_scale, height, width: of the picture.
        image: file of a picture to edit; it is cut to the shape of the new one, and scaled.

    Raises:
        OSError: there is no such file, or it is no picture.
        NotFiniteError: as `to_picture` says.
        ValueError: the pipeline has no such size, edits no pictures or has no use for a negative prompt, or its
            scheduler has not so many steps.
    """
    size = [given or own for given, own in zip((height, width), default_size(pipe), strict=True)]
    shape = latent_shape(pipe, height, width)
    call = {
        "prompt": [prompt],
        "latents": pack(pipe, initial_noise([seed], shape)),
        "num_inference_steps": steps,
        **guidance(pipe, guidance_scale, [negative_prompt]),
        **text_length(pipe),
    }
    if image:
        try:
            source = source_picture(Path(image).read_bytes(), *size)
        except UnidentifiedImageError as error:
            raise OSError(f"{image} is no picture that PIL can read.") from error
        call["image"] = encode_sources(pipe, source[None])
    latents = pipe(**call_at_size(pipe, call, *size))[0]
    return to_picture(pipe, decode(pipe, unpack(pipe, latents, shape)))


def to_picture(pipe: DiffusionPipeline, images_BCHW: torch.Tensor) -> Image.Image:
    """The first of some images in [0, 1]. Raises NotFiniteError where it would be black, or have black spots."""
    if not images_BCHW[0].isfinite().all():
        raise NotFiniteError(
            f"{type(pipe.scheduler).__name__} gives NaN or infinite pixels: take fewer steps, another scheduler, or "
            "--dtype float32."
        )
    return pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(images_BCHW))[0]


def render_png(pipe: DiffusionPipeline, facts: Mapping[str, object], steps: int, path: Path, solver: str) -> Path:
    """The picture of `facts` (what `sample` takes, model and dtype) in a PNG that remembers them, and the solver."""
    of_picture = {key: value for key, value in facts.items() if key not in ("model", "image_sha256", "dtype")}
    image = sample(pipe, steps=steps, **of_picture)
    save_png(image, path, {**facts, "solver": solver, "steps": steps})
    return path


def save_png(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Writes a PNG whose text chunks say how it was made."""
    chunks = PngInfo()
    for name, value in facts.items():
        chunks.add_itxt(PREFIX + name, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=chunks)


def open_picture(path: Path, formats: Sequence[str] | None = None) -> tuple[Image.Image, dict[str, str]]:
    """A picture in RGB and, of a PNG, its text chunks.

    Raises:
        OSError: there is no such file, or it is no picture of these formats.
        ValueError: it is too large, or broken.
    """
    try:
        with Image.open(path, formats=formats) as image:
            text = image.text if image.format == "PNG" else {}
            return image.convert("RGB"), text
    except OSError:
        raise
    except Exception as error:  # whatever a file that a stranger made brings PIL's decoders to
        raise ValueError(f"{path} is no picture that can be read: {type(error).__name__}, {error}") from error


def read_facts(path: Path, names: Sequence[str]) -> dict:
    """Some of what `save_png` wrote.

    Raises:
        OSError: there is no such file, or it is no picture.
        ValueError: the picture is too large or broken, does not say how it was made, or says no numbers.
    """
    _, text = open_picture(path)
    facts = {name: text[PREFIX + name] for name in names if PREFIX + name in text}
    if not facts:
        raise ValueError(f"{path} does not say how it was made; give --model, --prompt and --seed.")
    try:
        return {name: NUMBERS.get(name, str)(value) for name, value in facts.items()}
    except ValueError as error:
        raise ValueError(f"{path} does not say how it was made: {error}.") from error
