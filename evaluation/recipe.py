"""Everything that decides a picture, what it costs, and the picture.

    recipe = Recipe("a red ring above a blue cube", seed=7, method="solver", steps=5, solver="runs/mini_sd/best")
    work(pipe, recipe).evaluations                              # 5
    image = make(pipe, recipe, load_solver(pipe, recipe)).image

| method   | the picture                                                                                      |
|----------|--------------------------------------------------------------------------------------------------|
| `solver` | a few steps of a learned solver: `sample.py solver`                                              |
| `few`    | as few steps of the solver of full renders: `sample.py refine --steps`                           |
| `half`   | of half the size, steered to be the full-size one: `sample.py preview`                           |
| `both`   | of half the size, its small steps by the learned solver: `sample.py preview --solver`            |
| `full`   | the full render: `sample.py refine`                                                              |

The same recipe is the same picture as that of the command, bit for bit on one device.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from evaluation import solvers
from evaluation.config import MOST_STEPS, is_step_count
from evaluation.single import full_scheduler, sample
from solver import ConsistencySolverScheduler
from solver.samplers.calls import guidance, text_length
from solver.samplers.cascade import replaced, require_flow
from solver.samplers.cost import evaluation_flops, image_tokens, network_of
from solver.samplers.latents import default_size, denoiser, latent_shape, patch_size, vae_factor
from solver.samplers.preview import Checkpoint, PreviewOptions, preview, refine

METHODS = {
    "solver": "Learned solver",
    "few": "Plain few steps",
    "half": "Half-size preview",
    "both": "Half-size preview, learned solver",
    "full": "Full render",
}
SMALL = ("half", "both")  # methods whose pictures are half as wide and high
LEARNED = ("solver", "both")
SWITCH = 1 / 3  # of the full run, the paper's 10 of 30 steps
OF_SAMPLE = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width", "image")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture, besides the pipeline.

    Attributes:
        prompt, negative_prompt, seed, guidance_scale: of the picture.
        method: a key of `METHODS`.
        steps: of the run; of a half-size preview, its small ones.
        full_steps: of the full render that it is a preview of; that of a full render is `steps`.
        height, width: of the full render, in pixels; the pipeline's own where they are None.
        solver: folder or hub id of the learned solver, or diffusers class of the plain one; the one of full renders
            where it is None.
        image: file of the picture to edit; none where it is empty.
        image_sha256: of that file; for the PNG, which does not contain it.

    Raises:
        ValueError: for any value that no picture has.
    """

    prompt: str
    seed: int
    method: str = "full"
    steps: int = 40
    full_steps: int = 40
    guidance_scale: float = 3.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    solver: str | None = None
    image: str = ""
    image_sha256: str = ""

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}: expected one of {', '.join(METHODS)}.")
        for name in ("steps", "full_steps"):
            if not is_step_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 to {MOST_STEPS}.")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: expected a whole number of 64 bits.")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale={self.guidance_scale}: expected 0 to 100.")
        if self.method in LEARNED and not self.solver:
            raise ValueError(f"{METHODS[self.method]} needs a learned solver; name its folder or hub id.")
        if self.method in SMALL and self.image:
            raise ValueError(f"{METHODS[self.method]}: edits have none.")

    @property
    def full(self) -> "Recipe":
        """The full render that this is a preview of."""
        steps = self.steps if self.method == "full" else self.full_steps
        return replace(self, method="full", steps=steps, full_steps=steps, solver=None)


class Made(NamedTuple):
    """A picture, and where its full-size run goes on if it has begun one."""

    image: Image.Image
    checkpoint: Checkpoint | None = None


def load_solver(pipe: DiffusionPipeline, recipe: Recipe, only_here: bool = False) -> ConsistencySolverScheduler | None:
    """The learned solver of a recipe, None where it has none; `only_here`, nothing is fetched from the hub.

    Raises:
        OSError: there is no such solver.
        ValueError: it belongs to another noise schedule.
    """
    if recipe.method not in LEARNED:
        return None
    return solvers.load_solver(recipe.solver, pipe.scheduler, only_here)


@torch.no_grad()
def make(pipe: DiffusionPipeline, recipe: Recipe, learned: ConsistencySolverScheduler | None = None) -> Made:
    """The picture of a recipe.

    Args:
        pipe: with its own scheduler, which it has again afterwards.
        recipe: the picture.
        learned: `load_solver(pipe, recipe)`, loaded once for many pictures.

    Raises:
        ValueError: the pipeline cannot make it, as `check` says.
        NotFiniteError: as `evaluation.single.to_picture` says.
    """
    check(pipe, recipe)
    if learned is not None:
        learned.guidance_scale = recipe.guidance_scale
    if recipe.method in SMALL:
        size = {"height": recipe.height, "width": recipe.width}
        call = {**_guidance(pipe, recipe), **text_length(pipe)}
        (made,) = preview(pipe, [recipe.prompt], [recipe.seed], options(recipe), stepper=learned, **size, **call)
        return Made(made.image, made.checkpoint)
    scheduler = full_scheduler(recipe.solver, pipe.scheduler) if learned is None else learned
    with replaced(pipe, "scheduler", scheduler):
        return Made(sample(pipe, **{name: getattr(recipe, name) for name in OF_SAMPLE}))


def go_on(pipe: DiffusionPipeline, checkpoint: Checkpoint) -> Made:
    """The full render of a half-size preview: its own full-size steps go on."""
    (image,) = refine(pipe, [checkpoint])
    return Made(image)


def check(pipe: DiffusionPipeline, recipe: Recipe) -> None:
    """Raises ValueError, before any work, if the pipeline cannot make this picture."""
    height, width = size(pipe, recipe)
    latent_shape(pipe, height, width)
    if recipe.method in SMALL:
        require_flow(pipe, pipe.scheduler)
        chosen = options(recipe)
        multiple = chosen.scale * vae_factor(pipe) * patch_size(pipe)
        if height % multiple or width % multiple:
            raise ValueError(f"height={height}, width={width}: half-size previews need multiples of {multiple}.")
    _guidance(pipe, recipe)


def options(recipe: Recipe) -> PreviewOptions:
    """The half-size preview of a recipe: the usual one, scaled to its steps."""
    switch = round(SWITCH * recipe.full_steps)
    small = None if recipe.method == "half" else recipe.steps
    guided = None if recipe.full_steps > 3 else 0  # of so few steps none is guided
    return PreviewOptions(recipe.full_steps, switch=switch, guided_steps=guided, small_steps=small)


def size(pipe: DiffusionPipeline, recipe: Recipe) -> tuple[int, int]:
    """Height and width of the full render, in pixels."""
    own = default_size(pipe)
    given = (recipe.height, recipe.width)
    height, width = (default if side is None else side for side, default in zip(given, own, strict=True))
    return height, width


def picture_size(pipe: DiffusionPipeline, recipe: Recipe) -> tuple[int, int]:
    """Height and width of the picture, in pixels."""
    height, width = size(pipe, recipe)
    return (height // 2, width // 2) if recipe.method in SMALL else (height, width)


def _guidance(pipe: DiffusionPipeline, recipe: Recipe) -> dict:
    return guidance(pipe, recipe.guidance_scale, [recipe.negative_prompt])


class Work(NamedTuple):
    """Evaluations of the network for one picture, guidance's two branches counted once, and the same in FLOPs.

    Attributes:
        evaluations: at any size.
        full_size: how many evaluations at full size cost as much.
    """

    evaluations: int
    full_size: float


def work(pipe: DiffusionPipeline, recipe: Recipe) -> Work:
    """What a picture costs. Raises ValueError as `check`."""
    check(pipe, recipe)
    if recipe.method not in SMALL:
        return Work(recipe.steps, float(recipe.steps))
    chosen = options(recipe)
    small = chosen.small_evaluations * _small_share(pipe, *size(pipe, recipe), chosen.scale)
    return Work(chosen.full_steps + chosen.small_evaluations, chosen.full_steps + small)


def _small_share(pipe: DiffusionPipeline, height: int, width: int, scale: int) -> float:
    """FLOPs of an evaluation of a smaller picture, over those at full size; by area where they are not known."""
    try:
        words = text_length(pipe).get("max_sequence_length")
        network = network_of(denoiser(pipe), vae_factor(pipe) * patch_size(pipe), words)
    except ValueError:
        return 1 / scale**2
    full = evaluation_flops(network, image_tokens(network, height, width))
    return evaluation_flops(network, image_tokens(network, height // scale, width // scale)) / full
