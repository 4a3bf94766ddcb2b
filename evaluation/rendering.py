"""Pictures from stock pipelines: the same noise for every solver, network evaluations counted, time taken.

The first evaluation of a prompt is the same for every solver that starts at the same timestep, and the second one for
all multistep solvers on the same grid, since all begin with a DDIM step. A sampler makes such evaluations once. They
count for every solver that asked for them, in evaluations and in seconds; only the wait for the table gets shorter.

Shape suffixes: B images, C H W.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.hooks import HookRegistry, ModelHook

from data.noise import initial_noise
from data.teacher import open_pipeline
from solver.prompt_embeddings import PromptEmbeddings
from solver.rollout import replaced
from solver.samplers.latents import decode, latent_shape, pack, unpack

SCHEDULER_CALLS = ("set_timesteps", "scale_model_input", "step")
STOCHASTIC_SEED = 1 << 32  # schedulers that draw noise on the way must not draw the initial noise again
SHARED_CALLS = 2  # of a run, in which solvers can coincide; from the third one on each goes its own way


def load_pipeline(model: str, dtype: str, device: str | None) -> DiffusionPipeline:
    """A pipeline with its own scheduler, the VAE in float32, on the GPU if there is one and `device` is None.

    Raises:
        OSError: there is no such pipeline.
    """
    try:
        pipe = open_pipeline(model, getattr(torch, dtype))
    except OSError as error:
        raise OSError(f"model {model!r} is no pipeline folder here, and none on the hub or in its cache.") from error
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class NotFiniteError(ValueError):
    """A solver diverged: its pictures are NaN or infinite."""


@dataclass
class Cost:
    """What rendering costs a user, who shares no evaluations: a number a batch.

    Attributes:
        evaluations: calls of the denoiser; with guidance, one evaluates the prompt and the empty prompt together.
        seconds: wall time of an image, decoding included; a shared evaluation counts with the mean time of one.
        solver_share: of the pipeline's time, spent in the scheduler.
    """

    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    solver_share: list[float] = field(default_factory=list)

    def summary(self) -> dict:
        """Medians; the first batch of several counts as a warm-up."""
        if len(set(self.evaluations)) > 1:
            raise RuntimeError(f"The denoiser was called {sorted(set(self.evaluations))} times in runs of one cell.")

        def median(values: list[float]) -> float:
            return float(torch.tensor(values[1:] or values, dtype=torch.float64).median())

        times = {"seconds_per_image": median(self.seconds), "solver_share": median(self.solver_share)}
        return {"nfe": self.evaluations[0], **times}


class SharedEvaluations:
    """Outputs of a denoiser by what it was asked, kept on the CPU."""

    def __init__(self):
        self._known: dict[tuple, list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]] = {}

    def find(self, question: tuple, sample: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The output for a sample that was asked about before, equal to the last bit: sharing changes no picture."""
        for known, output in self._known.get(question, []):
            if torch.equal(known.to(sample.device), sample):
                return tuple(value.to(sample.device) for value in output)
        return None

    def keep(self, question: tuple, sample: torch.Tensor, output: tuple[torch.Tensor, ...]) -> None:
        """Keeps an answer. The second element of a question is the number of the call in its run."""
        self._known.setdefault(question, []).append((sample.cpu(), tuple(value.cpu() for value in output)))

    def forget(self, from_call: int = 0) -> None:
        """Drops the answers to calls of this number and later ones."""
        self._known = {question: known for question, known in self._known.items() if question[1] < from_call}


class Evaluations(ModelHook):
    """Counts the calls of a denoiser, and answers those that were made before without it.

    Args:
        batch: identifies prompts, seeds and guidance.
        shared: None to evaluate everything.
        clock: seconds.
        autocast: the denoiser computes in bfloat16 and answers in float32.
    """

    def __init__(
        self, batch: tuple, shared: SharedEvaluations | None, clock: Callable[[], float], autocast: bool = False
    ):
        super().__init__()
        self.batch, self.shared, self.clock, self.autocast = batch, shared, clock, autocast
        self.count = self.evaluated = 0
        self.seconds = 0.0

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        call, self.count = self.count, self.count + 1
        if self.shared is None or call >= SHARED_CALLS:
            return self._evaluate(module, args, kwargs)
        arguments = inspect.signature(self.fn_ref.original_forward).bind(*args, **kwargs).arguments
        sample = next(iter(arguments.values()))
        question = (self.batch, call, *_conditions(arguments))
        output = self.shared.find(question, sample)
        if output is None:
            output = self._evaluate(module, args, kwargs)
            if isinstance(output, tuple):
                self.shared.keep(question, sample, output)
        return output

    def _evaluate(self, module: torch.nn.Module, args: tuple, kwargs: dict):
        start = self.clock()
        # Here and not around the pipeline, where guidance and some schedulers would lose digits too.
        with torch.autocast(module.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.fn_ref.original_forward(*args, **kwargs)
        output = convert_to_fp32(output) if self.autocast else output
        self.seconds += self.clock() - start
        self.evaluated += 1
        return output


def _conditions(arguments: dict) -> tuple:
    """What a denoiser is told beside the sample: the timestep, and a number for every other tensor."""
    timestep = torch.as_tensor(arguments["timestep"]).flatten().tolist()
    others = [value for name, value in list(arguments.items())[1:] if name != "timestep"]
    others += [value for group in others if isinstance(group, dict) for value in group.values()]
    sums = [float(value.double().sum()) for value in others if isinstance(value, torch.Tensor)]
    return (tuple(round(t, 6) for t in timestep), tuple(sums))


class Sampler:
    """A stock pipeline that renders (prompt, seed) pairs.

    Args:
        pipe: on its device.
        height, width: in pixels; the pipeline's own where they are None.
        batch_size: images rendered together.
        autocast: the denoiser in bfloat16.
        share: make evaluations that several solvers ask for once.

    Attributes:
        evaluations: that the denoiser really made, an image each; guidance included.
        seconds: which they took.
        shared: what runs have in common; `shared.forget` makes room.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 25,
        autocast: bool = False,
        share: bool = True,
    ):
        self.pipe, self.batch_size, self.autocast = pipe, batch_size, autocast
        self.shared = SharedEvaluations() if share else None
        self.evaluations, self.seconds = 0, 0.0
        self.size = {"height": height, "width": width}
        self.latent_shape = latent_shape(pipe, height, width)
        self.embeddings = PromptEmbeddings(pipe)

    def render(
        self,
        scheduler: SchedulerMixin,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        cost: Cost | None = None,
    ) -> Iterator[torch.Tensor]:
        """Batches of pictures, float32 (B, 3, H, W) in [0, 1] on the pipeline's device, in the order of the prompts.

        Args:
            scheduler: for this run only; afterwards the pipeline has its own again.
            prompts, seeds: one each a picture.
            steps: of the scheduler.
            guidance_scale: of the pipeline.
            cost: gets the numbers of every batch.

        Raises:
            NotFiniteError: a picture is not finite.
        """
        for first in range(0, len(prompts), self.batch_size):
            batch = slice(first, first + self.batch_size)
            identity = (tuple(prompts[batch]), tuple(seeds[batch]), guidance_scale)
            with torch.no_grad(), self._counted(scheduler, identity) as (evaluations, solver):
                start = self._clock()
                latents_BCHW = self._latents(prompts[batch], seeds[batch], steps, guidance_scale)
                rendered = self._clock()
                images_BCHW = decode(self.pipe, latents_BCHW)
                decoded = self._clock()
            if not images_BCHW.isfinite().all():
                raise NotFiniteError(
                    f"{type(scheduler).__name__} with {steps} steps at guidance {guidance_scale:g} gives NaN or "
                    "infinite pictures; leave it out, or compute in float32."
                )
            self.evaluations += evaluations.evaluated * len(images_BCHW)
            self.seconds += evaluations.seconds
            if cost is not None:
                one = self.seconds / self.evaluations * len(images_BCHW)
                saved = (evaluations.count - evaluations.evaluated) * one
                cost.evaluations.append(evaluations.count)
                cost.seconds.append((decoded - start + saved) / len(images_BCHW))
                cost.solver_share.append(sum(solver) / (rendered - start + saved))
            yield images_BCHW

    def _latents(self, prompts, seeds, steps, guidance_scale) -> torch.Tensor:
        noise_BCHW = initial_noise(seeds, self.latent_shape)
        latents = self.pipe(
            **self.embeddings(prompts),
            latents=pack(self.pipe, noise_BCHW),
            generator=[torch.Generator().manual_seed(STOCHASTIC_SEED + seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            return_dict=False,
            **self.size,
        )[0]
        return unpack(self.pipe, latents, self.latent_shape)

    # Counting

    @contextmanager
    def _counted(self, scheduler: SchedulerMixin, batch: tuple) -> Iterator[tuple[Evaluations, list[float]]]:
        """The scheduler in place, the denoiser's calls counted, the scheduler's calls timed."""
        evaluations, seconds = Evaluations(batch, self.shared, self._clock, self.autocast), []
        denoiser = self.pipe.transformer if self.pipe.components.get("unet") is None else self.pipe.unet
        hooks = HookRegistry.check_if_exists_or_initialize(denoiser)
        hooks.register_hook(evaluations, "evaluations")
        calls = [name for name in SCHEDULER_CALLS if hasattr(scheduler, name)]
        for name in calls:
            setattr(scheduler, name, self._timed(getattr(scheduler, name), seconds))
        try:
            with replaced(self.pipe, "scheduler", scheduler):
                yield evaluations, seconds
        finally:
            for name in calls:
                delattr(scheduler, name)
            hooks.remove_hook("evaluations", recurse=False)

    def _timed(self, call: Callable, seconds: list[float]) -> Callable:
        @wraps(call)  # pipelines inspect the signatures
        def timed(*args, **kwargs):
            start = self._clock()
            answer = call(*args, **kwargs)
            seconds.append(self._clock() - start)
            return answer

        return timed

    def _clock(self) -> float:
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize(self.pipe.device)
        return time.perf_counter()
