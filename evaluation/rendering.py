"""Pictures from stock pipelines: the same noise for every solver, network evaluations counted, time taken.

Shape suffixes: B images, C H W.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.hooks import HookRegistry, ModelHook

from data.latents import decode, latent_shape, pack, unpack
from data.noise import initial_noise
from solver.prompt_embeddings import PromptEmbeddings
from solver.rollout import replaced

SCHEDULER_CALLS = ("set_timesteps", "scale_model_input", "step")
STOCHASTIC_SEED = 1 << 32  # schedulers that draw noise on the way must not draw the initial noise again


def load_pipeline(model: str, dtype: str, device: str | None) -> DiffusionPipeline:
    """A pipeline with its own scheduler, the VAE in float32, on the GPU if there is one and `device` is None.

    Raises:
        OSError: there is no such pipeline.
    """
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype={"default": getattr(torch, dtype), "vae": torch.float32})
    except OSError as error:
        raise OSError(f"model {model!r} is no pipeline folder here, and none on the hub or in its cache.") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass
class Cost:
    """What rendering took, a number a batch.

    Attributes:
        evaluations: calls of the denoiser; with guidance, one evaluates the prompt and the empty prompt together.
        seconds: wall time of an image, decoding included.
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


class Evaluations(ModelHook):
    """Counts the calls of a denoiser; with `autocast` it computes in bfloat16 and answers in float32."""

    def __init__(self, autocast: bool = False):
        super().__init__()
        self.autocast, self.count = autocast, 0

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        self.count += 1
        # Here and not around the pipeline, where guidance and some schedulers would lose digits too.
        with torch.autocast(module.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.fn_ref.original_forward(*args, **kwargs)
        return convert_to_fp32(output) if self.autocast else output


class Sampler:
    """A stock pipeline that renders (prompt, seed) pairs.

    Args:
        pipe: on its device.
        height, width: in pixels; the pipeline's own where they are None.
        batch_size: images rendered together.
        autocast: the denoiser in bfloat16.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 25,
        autocast: bool = False,
    ):
        self.pipe, self.batch_size, self.autocast = pipe, batch_size, autocast
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
            ValueError: a picture is not finite.
        """
        for first in range(0, len(prompts), self.batch_size):
            batch = slice(first, first + self.batch_size)
            with torch.no_grad(), self._counted(scheduler) as (evaluations, solver):
                start = self._clock()
                latents_BCHW = self._latents(prompts[batch], seeds[batch], steps, guidance_scale)
                rendered = self._clock()
                images_BCHW = decode(self.pipe, latents_BCHW)
                decoded = self._clock()
            if not images_BCHW.isfinite().all():
                raise ValueError(
                    f"{type(scheduler).__name__} with {steps} steps at guidance {guidance_scale:g} gives NaN or "
                    "infinite pictures; leave it out, or compute in float32."
                )
            if cost is not None:
                cost.evaluations.append(evaluations.count)
                cost.seconds.append((decoded - start) / len(images_BCHW))
                cost.solver_share.append(sum(solver) / (rendered - start))
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
    def _counted(self, scheduler: SchedulerMixin) -> Iterator[tuple[Evaluations, list[float]]]:
        """The scheduler in place, the denoiser's calls counted, the scheduler's calls timed."""
        evaluations, seconds = Evaluations(self.autocast), []
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
