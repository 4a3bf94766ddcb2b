"""Pictures from stock pipelines: the same noise for every solver, network evaluations counted, time taken.

The first evaluation of a prompt is the same for every solver that starts at the same timestep, and the second one for
all multistep solvers on the same grid, since all begin with a DDIM step. A sampler makes such evaluations once. They
count for every solver that asked for them, in evaluations and in seconds; only the wait for the table gets shorter.

An evaluation is one of the network as the guidance needs it: of the prompt and the empty prompt together, be it in one
call of the denoiser, or in two, as in FLUX with true classifier-free guidance.

Shape suffixes: B images, C H W.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.hooks import HookRegistry, ModelHook

from data.noise import initial_noise
from data.prompts import source_identity, source_picture
from data.teacher import open_pipeline
from solver.prompt_embeddings import PromptEmbeddings
from solver.samplers.calls import encode_sources, guidance, guides_by_true_cfg
from solver.samplers.cascade import call_at_size, replaced
from solver.samplers.latents import decode, default_size, denoiser, latent_shape, pack, unpack

if TYPE_CHECKING:
    from data.prompts import Source
    from data.scenes import Scene

SCHEDULER_CALLS = ("set_timesteps", "scale_model_input", "step")
# Schedulers that draw noise on the way must not draw the initial noise again. A CPU generator reads the low 32 bits of
# its seed only, so a stream of its own differs there.
STOCHASTIC_STREAM = 0x5EED0000
SHARED_EVALUATIONS = 2  # of a run, in which solvers can coincide; from the third one on each goes its own way


class Samples(NamedTuple):
    """What is rendered: one picture a (prompt, seed), all at one guidance scale.

    Attributes:
        prompts, seeds, guidance_scale: of the pictures.
        sources: what each of them is to change, for `data.prompts.source_picture`; None if they change nothing.
        edited: scenes that they should lead to, for the edit check; None where that is not known.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    sources: "tuple[Source, ...] | None" = None
    edited: "tuple[Scene, ...] | None" = None

    def rows(self, first: int, stop: int) -> "Samples":
        """Some of them."""
        parts = (values and values[first:stop] for values in (self.prompts, self.seeds, self.sources, self.edited))
        prompts, seeds, sources, edited = parts
        return Samples(prompts, seeds, self.guidance_scale, sources, edited)

    @property
    def identity(self) -> list:
        """What decides the pictures, in plain JSON values."""
        sources = [] if self.sources is None else [[source_identity(source).hex() for source in self.sources]]
        return [self.prompts, self.seeds, self.guidance_scale, *sources]


def load_pipeline(
    model: str, dtype: str, device: str | None, pipeline: str | None = None, only_here: bool = False
) -> DiffusionPipeline:
    """A pipeline with its own scheduler, the VAE in float32, on the GPU if there is one and `device` is None.

    With `only_here` nothing is fetched from the hub.

    Raises:
        OSError: there is no such model.
        ValueError: `pipeline` is no class of diffusers, or there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: expected one that torch finds here, such as cpu.") from error
    return open_pipeline(model, getattr(torch, dtype), pipeline, only_here).to(device)


class NotFiniteError(ValueError):
    """A solver diverged: its pictures are NaN or infinite."""


@dataclass
class Cost:
    """What rendering costs a user, who shares no evaluations: a number a batch.

    Attributes:
        evaluations: of the network; with guidance, one is of the prompt and the empty prompt together.
        seconds: wall time of an image, decoding included; a shared evaluation counts with the mean time of one.
        solver_share: of the pipeline's time, spent in the scheduler.
    """

    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    solver_share: list[float] = field(default_factory=list)

    def summary(self) -> dict:
        """Medians; the first batch of several counts as a warm-up."""
        if len(set(self.evaluations)) > 1:
            raise RuntimeError(f"The network was evaluated {sorted(set(self.evaluations))} times in runs of one cell.")

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
        """Keeps an answer. The second element of a question is the number of the evaluation in its run."""
        self._known.setdefault(question, []).append((sample.cpu(), tuple(value.cpu() for value in output)))

    def forget(self, first: int = 0) -> None:
        """Drops the answers to evaluations of this number and later ones."""
        self._known = {question: known for question, known in self._known.items() if question[1] < first}


class Evaluations(ModelHook):
    """Counts the evaluations of a denoiser, and answers those that were made before without it.

    Args:
        batch: identifies prompts, seeds and guidance.
        shared: None to evaluate everything.
        clock: seconds.
        autocast: the denoiser computes in bfloat16 and answers in float32.
        calls_each: of the denoiser in an evaluation; 2 where prompt and empty prompt have calls of their own.

    Attributes:
        seconds: in the denoiser.
    """

    def __init__(
        self,
        batch: tuple,
        shared: SharedEvaluations | None,
        clock: Callable[[], float],
        autocast: bool = False,
        calls_each: int = 1,
    ):
        super().__init__()
        self.batch, self.shared, self.clock, self.autocast = batch, shared, clock, autocast
        self.calls_each = calls_each
        self._asked = self._answered = 0
        self.seconds = 0.0

    @property
    def count(self) -> int:
        """Evaluations that the run asked for."""
        return self._asked // self.calls_each

    @property
    def evaluated(self) -> int:
        """Those that were made."""
        return self._answered // self.calls_each

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        number = self.count
        self._asked += 1
        if self.shared is None or number >= SHARED_EVALUATIONS:
            return self._evaluate(module, args, kwargs)
        arguments = inspect.signature(self.fn_ref.original_forward).bind(*args, **kwargs).arguments
        sample = next(iter(arguments.values()))
        question = (self.batch, number, *_conditions(arguments))
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
        self._answered += 1
        return output


def _conditions(arguments: dict) -> tuple:
    """What a denoiser is told beside the sample: the timestep, and a number for every other tensor."""
    timestep = torch.as_tensor(arguments["timestep"]).flatten().tolist()
    others = [value for name, value in list(arguments.items())[1:] if name != "timestep"]
    others += [value for group in others if isinstance(group, dict) for value in group.values()]
    sums = [float(value.double().sum()) for value in others if isinstance(value, torch.Tensor)]
    return (tuple(round(t, 6) for t in timestep), tuple(sums))


class Sampler:
    """A stock pipeline that renders samples as the offline dataset and the trainer do.

    Args:
        pipe: on its device.
        height, width: in pixels; the pipeline's own where they are None.
        batch_size: images rendered together.
        autocast: the denoiser in bfloat16.
        share: make evaluations that several solvers ask for once.

    Attributes:
        evaluations: that were really made, an image each; guidance included.
        seconds: which they took.
        height, width: of a picture, in pixels.
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
        self.latent_shape = latent_shape(pipe, height, width)
        self.height, self.width = height or default_size(pipe)[0], width or default_size(pipe)[1]
        self.embeddings = PromptEmbeddings(pipe)
        self._sources: dict[Source, torch.Tensor] = {}

    def render(
        self,
        scheduler: SchedulerMixin,
        samples: Samples,
        steps: int,
        guidance_scale: float,
        cost: Cost | None = None,
    ) -> Iterator[torch.Tensor]:
        """Batches of pictures, float32 (B, 3, H, W) in [0, 1] on the pipeline's device, in the order of the samples.

        Args:
            scheduler: for this run only; afterwards the pipeline has its own again.
            samples: prompts, seeds, and pictures to edit.
            steps: of the scheduler.
            guidance_scale: of the pipeline's call, in the place of the samples' own.
            cost: gets the numbers of every batch.

        Raises:
            NotFiniteError: a picture is not finite.
            ValueError: there are pictures to edit, and the pipeline edits none.
        """
        for first in range(0, len(samples.prompts), self.batch_size):
            batch = samples.rows(first, first + self.batch_size)._replace(guidance_scale=guidance_scale)
            with torch.no_grad(), self._counted(scheduler, batch) as (evaluations, solver):
                call = self._call(batch, steps)
                start = self._clock()
                latents_BCHW = unpack(self.pipe, self.pipe(**call)[0], self.latent_shape)
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

    def _call(self, batch: Samples, steps: int) -> dict:
        call = {
            **self.embeddings(batch.prompts),
            **guidance(self.pipe, batch.guidance_scale),
            "latents": pack(self.pipe, initial_noise(batch.seeds, self.latent_shape)),
            "generator": [
                torch.Generator().manual_seed((seed ^ STOCHASTIC_STREAM) & 0xFFFFFFFF) for seed in batch.seeds
            ],
            "num_inference_steps": steps,
        }
        if batch.sources is not None:
            call["image"] = torch.cat([self._encoded(source) for source in batch.sources]).to(self.pipe.device)
        return call_at_size(self.pipe, call, self.height, self.width)

    def _encoded(self, source: "Source") -> torch.Tensor:
        """A picture to edit as latents, encoded alone and once."""
        if source not in self._sources:
            picture_CHW = source_picture(source, self.height, self.width)
            self._sources[source] = encode_sources(self.pipe, picture_CHW[None]).cpu()
        return self._sources[source]

    # Counting

    @contextmanager
    def _counted(self, scheduler: SchedulerMixin, batch: Samples) -> Iterator[tuple[Evaluations, list[float]]]:
        """The scheduler in place, the denoiser's evaluations counted, the scheduler's calls timed."""
        calls_each = 2 if guides_by_true_cfg(self.pipe) and batch.guidance_scale > 1 else 1
        identity = (batch.prompts, batch.seeds, batch.guidance_scale)  # what is edited is in the denoiser's sample
        evaluations = Evaluations(identity, self.shared, self._clock, self.autocast, calls_each)
        seconds: list[float] = []
        hooks = HookRegistry.check_if_exists_or_initialize(denoiser(self.pipe))
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
