"""The model on its device: what pictures will cost, pictures one by one, refinements, and how alike two pictures are.

    table = LightTable.open("zoo/mini-sd", solver="runs/mini_sd/best")
    for picture in table.make(recipes, stop):     # one by one, so that a page can show them
        ...
    full = table.refine(picture, stop)

One picture at a time has the device, whoever asks. A set `stop` ends a run before the next evaluation of the network.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from PIL import Image
from torchvision.transforms.functional import to_tensor

from evaluation.recipe import LEARNED, METHODS, SMALL, Made, Recipe, go_on, load_solver, make, options, size, work
from evaluation.remembered import remembered, surroundings
from evaluation.rendering import load_pipeline
from rewards import Reward, load_reward
from solver.samplers.calls import branches, guides_by_true_cfg
from solver.samplers.cascade import is_flow
from solver.samplers.latents import default_size, denoiser
from solver.samplers.preview import Checkpoint

WARM_UP_STEPS = 3
Tell = Callable[[float], None]  # the share of a run that is done


class Stopped(Exception):
    """A run was stopped by who asked for it."""


class Estimate(NamedTuple):
    """What a run will cost.

    Attributes:
        pictures: how many.
        evaluations: of the network; of a prompt and the empty prompt together, they count as one.
        share: of the full renders of the same pictures, in FLOPs.
        seconds: on this device; None if nothing has been timed yet.
    """

    pictures: int
    evaluations: int
    share: float
    seconds: float | None


class Picture(NamedTuple):
    """A picture that was made.

    Attributes:
        recipe: what decides it.
        image: PIL.
        facts: what its PNG remembers.
        evaluations: of the network, that it took.
        seconds: that it took.
        checkpoint: where its full-size run goes on, of a half-size preview.
    """

    recipe: Recipe
    image: Image.Image
    facts: dict[str, str]
    evaluations: int
    seconds: float
    checkpoint: Checkpoint | None = None


class LightTable:
    """A pipeline, a learned solver if there is one, and rewards that compare pictures.

    Args:
        pipe: on its device.
        model, dtype: where it came from, for the PNGs.
        solver: folder or hub id of a learned solver.
        rewards: beside the PSNR of pixels.

    Raises:
        OSError: there is no such solver.
        ValueError: it belongs to another noise schedule.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        model: str,
        dtype: str = "float32",
        solver: str | None = None,
        rewards: Sequence[Reward] = (),
    ):
        self.pipe, self.model, self.solver = pipe, model, solver
        self.learned = load_solver(pipe, Recipe("", 0, "solver", solver=solver)) if solver else None
        self.rewards = [load_reward("pixels", device=pipe.device), *rewards]
        self.default_size = default_size(pipe)
        self._around = surroundings(pipe, model, dtype)
        self._around_learned = surroundings(pipe, model, dtype, self.learned)
        self._device = threading.Lock()
        self._seconds: tuple[float, float] | None = None  # a row takes a pixel, a picture besides

    @property
    def methods(self) -> list[str]:
        """Keys of `METHODS` that this model, with or without a learned solver, can do."""
        missing = () if self.learned is not None else LEARNED
        missing += () if is_flow(self.pipe.scheduler) else SMALL
        return [method for method in METHODS if method not in missing]

    @classmethod
    def open(
        cls,
        model: str,
        dtype: str = "float32",
        device: str | None = None,
        solver: str | None = None,
        rewards: Mapping[str, str | None] | None = None,
    ) -> "LightTable":
        """Everything by name; `rewards` is name → model. Raises ValueError or OSError as the parts do."""
        pipe = load_pipeline(model, dtype, device)
        loaded = [load_reward(name, model=path, device=pipe.device) for name, path in (rewards or {}).items()]
        return cls(pipe, model, dtype, solver, loaded)

    def estimate(self, recipes: Sequence[Recipe]) -> Estimate:
        """What these pictures will cost. Raises ValueError if one of them cannot be made."""
        works = [work(self.pipe, recipe) for recipe in recipes]
        full = sum(recipe.full.steps for recipe in recipes)
        done = sum(one.full_size for one in works)
        seconds = None
        if self._seconds is not None:
            a_pixel, besides = self._seconds
            height, width = size(self.pipe, recipes[0])
            rows = done * branches(self.pipe, recipes[0].guidance_scale)
            seconds = rows * a_pixel * height * width + besides * len(recipes)
        return Estimate(len(recipes), sum(one.evaluations for one in works), done / full, seconds)

    def estimate_refinements(self, previews: Sequence[Recipe]) -> Estimate:
        """What the full renders of these previews will cost; a half-size one has begun its own."""
        fulls = [recipe.full for recipe in previews]
        begun = sum(options(recipe).full_steps for recipe in previews if recipe.method in SMALL)
        whole = self.estimate(fulls)
        left = 1 - begun / whole.evaluations
        seconds = None if whole.seconds is None else whole.seconds * left
        return Estimate(len(fulls), whole.evaluations - begun, left, seconds)

    def warm_up(self) -> None:
        """Two small runs, of which the second is timed, so that the first estimate has seconds."""
        height, width = self.default_size
        recipe = Recipe("", 0, "few", steps=WARM_UP_STEPS, height=height, width=width)
        for _ in range(2):
            self._seconds = None  # of the first run
            list(self.make([recipe], threading.Event()))

    def make(
        self, recipes: Sequence[Recipe], stop: threading.Event, tell: Tell = lambda share: None
    ) -> Iterator[Picture]:
        """Pictures, one by one.

        Args:
            recipes: the pictures.
            stop: ends the run when it is set.
            tell: is told the share of the run that is done.

        Raises:
            Stopped: at the next evaluation after `stop` was set.
            ValueError: the pipeline cannot make a picture.
        """
        works = [work(self.pipe, recipe).evaluations for recipe in recipes]
        for i, recipe in enumerate(recipes):
            learned = self.learned if recipe.method in LEARNED else None

            def part(share: float, i: int = i) -> None:
                tell((sum(works[:i]) + share * works[i]) / sum(works))

            with self._turn(stop):
                picture = self._timed(recipe, works[i], stop, part, lambda r=recipe, s=learned: make(self.pipe, r, s))
            yield picture

    def refine(self, preview: Picture, stop: threading.Event, tell: Tell = lambda share: None) -> Picture:
        """The full render of a preview: a half-size one goes on, else it is made from prompt and seed.

        Raises:
            Stopped, ValueError: as `make`.
        """
        checkpoint, recipe = preview.checkpoint, preview.recipe.full
        if checkpoint is None:
            (picture,) = self.make([recipe], stop, tell)
            return picture
        left = checkpoint.num_inference_steps - checkpoint.next_step
        with self._turn(stop):
            return self._timed(recipe, left, stop, tell, lambda: go_on(self.pipe, checkpoint))

    def scores(self, preview: Image.Image, full: Image.Image) -> dict[str, float]:
        """Similarity of a preview to its full render by reward; of a half-size one, to the means of 2 x 2 pixels."""
        small_BCHW, full_BCHW = to_tensor(preview)[None], to_tensor(full)[None]
        if full_BCHW.shape != small_BCHW.shape:
            full_BCHW = F.interpolate(full_BCHW, size=small_BCHW.shape[-2:], mode="area")
        return {reward.name: float(reward(images=small_BCHW, target_images=full_BCHW)) for reward in self.rewards}

    # One picture

    @contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[None]:
        """The device, unless stopped while waiting for it."""
        while not self._device.acquire(timeout=0.1):
            if stop.is_set():
                raise Stopped
        try:
            yield
        finally:
            self._device.release()

    def _timed(self, recipe: Recipe, evaluations: int, stop: threading.Event, tell: Tell, run) -> Picture:
        """Runs, looks at `stop` before every evaluation, and remembers how long one takes."""
        calls_each = 2 if guides_by_true_cfg(self.pipe) and recipe.guidance_scale > 1 else 1
        looks: list[float] = []

        def look() -> None:
            if stop.is_set():
                raise Stopped
            looks.append(time.perf_counter())
            tell(min((len(looks) - 1) / (evaluations * calls_each), 1.0))

        start = time.perf_counter()
        with watched(self.pipe, look):
            if stop.is_set():
                raise Stopped
            made: Made = run()
        seconds = time.perf_counter() - start
        tell(1.0)
        if recipe.method not in SMALL and len(looks) > calls_each:
            each = (looks[-1] - looks[0]) / (len(looks) - 1) * calls_each
            height, width = size(self.pipe, recipe)
            rows = branches(self.pipe, recipe.guidance_scale)
            self._seconds = (each / (rows * height * width), max(seconds - each * len(looks) / calls_each, 0.0))
        around = self._around_learned if recipe.method in LEARNED else self._around
        facts = remembered(self.pipe, recipe, around)
        return Picture(recipe, made.image, facts, evaluations, seconds, made.checkpoint)


class _Watch(ModelHook):
    """Calls a function before every evaluation of a denoiser."""

    def __init__(self, look: Callable[[], None]):
        super().__init__()
        self.look = look

    def pre_forward(self, module: torch.nn.Module, *args, **kwargs):
        self.look()
        return args, kwargs


@contextmanager
def watched(pipe: DiffusionPipeline, look: Callable[[], None]) -> Iterator[None]:
    """Inside, `look()` is called before every evaluation of the denoiser; what it raises ends the run there."""
    hooks = HookRegistry.check_if_exists_or_initialize(denoiser(pipe))
    hooks.register_hook(_Watch(look), "watch")
    try:
        yield
    finally:
        hooks.remove_hook("watch", recurse=False)
