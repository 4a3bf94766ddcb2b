"""The teacher: a stock pipeline with many steps of a classical solver, and the rewards that look at its pictures.

`teacher.json` describes it in full. A resumed build and a training run compare themselves with that file.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from torchvision.io import encode_png

from data.noise import initial_noise, noise_check
from data.prompts import source_picture
from data.shards import to_bytes
from rewards import Reward
from solver.samplers.calls import encode_sources, guidance, text_length
from solver.samplers.cascade import call_at_size
from solver.samplers.digest import reward_digest, weights_digest
from solver.samplers.latents import decode, default_size, latent_shape, pack, unpack

if TYPE_CHECKING:
    from data.scenes import Scene

# They draw noise on the way: the same seed would not give the same picture.
STOCHASTIC = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "SASolver")


class Row(NamedTuple):
    """What the teacher is asked for."""

    prompt: str
    seed: int
    guidance_scale: float
    source: "Scene | bytes | None" = None  # what to edit, for `data.prompts.source_picture`


class Teacher:
    """Renders rows.

    Args:
        pipe: a stock pipeline, text-to-image or FLUX Kontext, on its device, with the scheduler to use.
        rewards: their features are cached beside each picture.
        num_inference_steps: of the scheduler.
        height: in pixels; the pipeline's own where it is None.
        width: likewise.

    Raises:
        ValueError: the size does not fit the pipeline, too many steps, or two rewards share a name.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        rewards: Sequence[Reward] = (),
        num_inference_steps: int = 40,
        height: int | None = None,
        width: int | None = None,
    ):
        self.pipe, self.num_inference_steps = pipe, num_inference_steps
        self.latent_shape = latent_shape(pipe, height, width)
        self.height, self.width = height or default_size(pipe)[0], width or default_size(pipe)[1]
        self.rewards = {reward.name: reward for reward in rewards}
        longest = pipe.scheduler.config.get("num_train_timesteps", num_inference_steps)
        if num_inference_steps > longest:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: this noise schedule has {longest} timesteps."
            )
        if len(self.rewards) < len(rewards):
            raise ValueError(f"rewards {[reward.name for reward in rewards]}: each can be used only once.")

    def render(self, rows: Sequence[Row]) -> list[dict | None]:
        """Renders rows of one guidance scale in one batch.

        Returns:
            per row the columns of `data.shards`, or None where the latents or the picture are not finite in float16.
        """
        (guidance_scale,) = {row.guidance_scale for row in rows}
        noise_BCHW = initial_noise([row.seed for row in rows], self.latent_shape)
        call = {
            "prompt": [row.prompt for row in rows],
            "latents": pack(self.pipe, noise_BCHW),
            "num_inference_steps": self.num_inference_steps,
            **guidance(self.pipe, guidance_scale, [""] * len(rows)),
            **text_length(self.pipe),
        }
        sources_BCHW = self._sources(rows)
        if sources_BCHW is not None:
            call["image"] = encode_sources(self.pipe, sources_BCHW)
        latents = self.pipe(**call_at_size(self.pipe, call, self.height, self.width))[0]
        latents_BCHW = unpack(self.pipe, latents, self.latent_shape)
        images_BCHW = decode(self.pipe, latents_BCHW)
        latents_BCHW = latents_BCHW.half()
        finite = latents_BCHW.isfinite().flatten(1).all(1) & images_BCHW.isfinite().flatten(1).all(1)
        rendered: list[dict | None] = [None] * len(rows)
        for b, features in zip(finite.nonzero().flatten().tolist(), self._features(images_BCHW[finite]), strict=True):
            prompt, seed, guidance_scale, _ = rows[b]
            rendered[b] = {
                "prompt": prompt,
                "seed": seed,
                "guidance_scale": guidance_scale,
                "target": {"bytes": _to_png(images_BCHW[b]), "path": None},
                "target_latents": to_bytes(latents_BCHW[b]),
                "latent_shape": list(self.latent_shape),
                "noise_check": noise_check(noise_BCHW[b]),
                **features,
            }
            if sources_BCHW is not None:
                rendered[b]["source"] = {"bytes": encode_png(sources_BCHW[b]).numpy().tobytes(), "path": None}
        return rendered

    def _sources(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """The pictures to edit, uint8 (B, 3, H, W), or None where the rows have none."""
        if rows[0].source is None:
            return None
        return torch.stack([source_picture(row.source, self.height, self.width) for row in rows])

    def describe(self) -> dict:
        """What determines the pictures, for teacher.json: plain JSON values."""
        scheduler = json.loads(self.pipe.scheduler.to_json_string(), parse_constant=str)  # strict JSON has no infinity
        del scheduler["_diffusers_version"]
        return {
            "pipeline": type(self.pipe).__name__,
            "components": {name: type(part).__name__ for name, part in self.pipe.components.items()},
            "weights": weights_digest(self.pipe),
            "scheduler": scheduler,
            "num_inference_steps": self.num_inference_steps,
            "height": self.height,
            "width": self.width,
            "latent_shape": list(self.latent_shape),
        }

    def describe_features(self) -> dict[str, dict]:
        """Shape and dtype of each reward's features of one picture, and the fingerprint of its network."""
        grey_BCHW = torch.full((1, 3, self.height, self.width), 0.5)
        features = {name: reward.features(grey_BCHW)[0] for name, reward in self.rewards.items()}
        return {
            name: {
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "weights": reward_digest(self.rewards[name]),
            }
            for name, value in features.items()
        }

    def _features(self, images_BCHW: torch.Tensor) -> list[dict[str, bytes]]:
        if not len(images_BCHW):
            return []
        features = {name: reward.features(images_BCHW) for name, reward in self.rewards.items()}
        return [
            {f"features_{name}": to_bytes(value[b]) for name, value in features.items()}
            for b in range(len(images_BCHW))
        ]


def open_pipeline(
    model: str, dtype: torch.dtype = torch.float32, pipeline: str | None = None, only_here: bool = False
) -> DiffusionPipeline:
    """A stock pipeline on the CPU with the scheduler that it came with, silent.

    Args:
        model: hub id or local folder.
        dtype: of everything but the VAE, which stays in float32: it runs once a picture, and overflows in float16.
        pipeline: diffusers class that is to run the model; the model's own where it is None.
        only_here: nothing is fetched from the hub.

    Raises:
        OSError: there is no such model.
        ValueError: there is no such class, or the model lacks parts of it.
    """
    pipeline_class = getattr(diffusers, pipeline or "DiffusionPipeline", None)
    if not (inspect.isclass(pipeline_class) and issubclass(pipeline_class, DiffusionPipeline)):
        raise ValueError(f"pipeline={pipeline!r} is not a pipeline class of diffusers {diffusers.__version__}.")
    dtypes = {"default": dtype, "vae": torch.float32}
    try:
        pipe = pipeline_class.from_pretrained(model, dtype=dtypes, local_files_only=only_here)
    except OSError as error:
        if Path(model).is_dir():
            raise OSError(f"model {model!r} is incomplete: {error}") from error
        elsewhere = (
            "none in the hub's cache, and the hub was not asked" if only_here else "none on the hub or in its cache"
        )
        raise OSError(f"model {model!r} is no pipeline folder here, and {elsewhere}.") from error
    except ValueError as error:
        if pipeline is None:
            raise ValueError(f"model {model!r} does not open: {error}") from error
        raise ValueError(f"model {model!r} does not open as {pipeline}; it is made for another pipeline.") from error
    for part in map(pipe.components.get, ("unet", "vae")):
        if part is not None:
            part.to(memory_format=torch.channels_last)  # what convolutions are fastest in
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(
    model: str,
    scheduler: str,
    scheduler_kwargs: Mapping | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    pipeline: str | None = None,
) -> DiffusionPipeline:
    """A stock pipeline with another scheduler.

    Args:
        model: hub id or local folder.
        scheduler: name of a diffusers class; it starts from the config of the pipeline's own.
        scheduler_kwargs: what to change in that config.
        dtype: of everything but the VAE, which stays in float32: it runs once a picture, and overflows in float16.
        device: where it runs.
        pipeline: as in `open_pipeline`.

    Raises:
        OSError: there is no such model.
        ValueError: there is no such scheduler, it takes no such argument, it draws noise of its own, or it is
            not made for the model's kind of noise schedule.
    """
    pipe = open_pipeline(model, dtype, pipeline)
    pipe.scheduler = make_scheduler(scheduler, scheduler_kwargs or {}, pipe.scheduler)
    pipe.vae.enable_slicing()  # a batch of large pictures in float32 would not fit on most GPUs
    return pipe.to(device)


def make_scheduler(name: str, kwargs: Mapping, own: SchedulerMixin) -> SchedulerMixin:
    """A deterministic scheduler on the noise schedule of `own`. Raises ValueError as `load_pipeline` says."""
    scheduler_class = getattr(diffusers, name, None)
    if not (
        inspect.isclass(scheduler_class) and issubclass(scheduler_class, SchedulerMixin) and _steps(scheduler_class)
    ):
        raise ValueError(f"scheduler={name!r} is not a scheduler class of diffusers {diffusers.__version__}.")
    unknown = kwargs.keys() - inspect.signature(scheduler_class.__init__).parameters.keys()
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(sorted(unknown))}; see its signature in diffusers.")
    try:
        scheduler = scheduler_class.from_config(own.config, **kwargs)
    except TypeError as error:  # it needs what a noise schedule of this kind does not have
        raise ValueError(f"{name} cannot take the place of {type(own).__name__}: {error}.") from error
    _check_deterministic(scheduler)
    _check_noise_schedule(scheduler, own)
    return scheduler


def _steps(scheduler_class: type) -> bool:
    """Whether it can be set up and walked; `SchedulerMixin` itself cannot."""
    return issubclass(scheduler_class, ConfigMixin) and hasattr(scheduler_class, "step")


def _check_deterministic(scheduler: SchedulerMixin) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    draws_noise = config.get("stochastic_sampling") or str(config.get("algorithm_type")).startswith("sde")
    if draws_noise or any(word in name for word in STOCHASTIC):
        raise ValueError(
            f"{name} draws noise on the way, so a seed does not fix the picture. Use an ODE solver, such as "
            "DPMSolverMultistepScheduler."
        )


def _check_noise_schedule(scheduler: SchedulerMixin, own: SchedulerMixin) -> None:
    def is_flow(s: SchedulerMixin) -> bool:
        return "FlowMatch" in type(s).__name__ or s.config.get("prediction_type") == "flow_prediction"

    if is_flow(scheduler) != is_flow(own):
        kinds = [f"{type(s).__name__} ({'flow' if is_flow(s) else 'diffusion'})" for s in (scheduler, own)]
        raise ValueError(
            f"{kinds[0]} cannot replace {kinds[1]}. On a flow model use FlowMatchEulerDiscreteScheduler, or pass "
            "prediction_type: flow_prediction and use_flow_sigmas: true."
        )


def library_versions() -> dict[str, str]:
    """What a difference in the last bits may come from."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "datasets")}


def differences(recorded: Mapping, expected: Mapping, complete: bool = False) -> list[str]:
    """One line for each key that differs, nested keys joined by dots.

    Args:
        recorded: content of teacher.json.
        expected: what it should be; where not `complete`, only the keys it has are compared.
    """
    old, new = _flatten(recorded), _flatten(expected)
    return [
        f"{key}: {old.get(key, 'nothing')!r} in teacher.json, {new.get(key, 'nothing')!r} here"
        for key in (old | new if complete else new)
        if old.get(key, "nothing") != new.get(key, "nothing")
    ]


def _flatten(content: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _to_png(image_CHW: torch.Tensor) -> bytes:
    return encode_png(image_CHW.mul(255).round().to(torch.uint8).cpu()).numpy().tobytes()
