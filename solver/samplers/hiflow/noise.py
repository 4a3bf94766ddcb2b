"""Flow, ε- and v-models in one coordinate: the noise level s, and the clean image x_0 that a network predicts.

    flow      x = (1 - σ) x_0 + σ ε,    model output ε - x_0,       s = σ
    the rest  x = α x_0 + σ ε,          ε, or α ε - σ x_0 (v),      s = σ/α, which is EDM's σ

With these s both are dy = f ds, so HiFlow's rules, written for flow models, hold for SD and SDXL as they stand.
"""

import inspect
import math

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from solver.samplers.cascade import fresh_copy, is_flow, require_deterministic
from solver.scheduling_consistency_solver import ConsistencySolverScheduler

PREDICTIONS = ("flow", "epsilon", "v_prediction")
OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")  # switches


def prediction_type(scheduler: SchedulerMixin) -> str:
    """One of `PREDICTIONS`.

    Raises:
        ValueError: the model predicts something else.
    """
    kind = "flow" if is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind!r}: HiFlow knows models that predict {', '.join(PREDICTIONS)}.")
    return kind


def check_rule(rule: str, kind: str) -> None:
    """Raises ValueError where the rule of the acceleration does not hold for what the model predicts."""
    if rule == "fixed-noise" and kind != "flow":
        raise ValueError(
            f"acceleration={rule!r} is for flow models, and this one predicts {kind}: take 'code', 'eq13' or 'eq10'."
        )


def noised(x0: Tensor, noise: Tensor, s: float, kind: str) -> Tensor:
    """The sample at noise level s of a clean image and a noise of its shape."""
    alpha, sigma = _signal_and_noise(s, kind)
    return alpha * x0 + sigma * noise


def clean_image(sample: Tensor, model_output: Tensor, s: float, kind: str) -> Tensor:
    """x_0 as the network predicts it."""
    alpha, sigma = _signal_and_noise(s, kind)
    if kind == "epsilon":
        return (sample - sigma * model_output) / alpha
    return (alpha if kind == "v_prediction" else 1) * sample - sigma * model_output


def model_output_of(sample: Tensor, x0: Tensor, s: float, kind: str) -> Tensor:
    """What the network would have to say for this x_0; the inverse of `clean_image`.

    Args:
        s: > 0.
    """
    alpha, sigma = _signal_and_noise(s, kind)
    if kind == "epsilon":
        return (sample - alpha * x0) / sigma
    return ((alpha if kind == "v_prediction" else 1) * sample - x0) / sigma


def _signal_and_noise(s: float, kind: str) -> tuple[float, float]:
    """α and σ; s is infinite where a schedule begins with noise alone (zero terminal SNR)."""
    if kind == "flow":
        return 1 - s, s
    return 1 / math.hypot(1, s), 1 / math.hypot(1, 1 / s)


def stage_solver(pipe: DiffusionPipeline, scheduler: SchedulerMixin | None = None) -> SchedulerMixin:
    """The solver of a stage, without history: Euler of flow models, DDIM, or a `ConsistencySolverScheduler`.

    Args:
        pipe: its scheduler is copied, or gives its configuration where it is another one: HiFlow is written for
            deterministic first-order steps, and a multistep history says nothing about a stage that begins in the
            middle.
        scheduler: instead of the pipeline's.

    Raises:
        ValueError: the given scheduler is another one, or of another kind of model, or the scheduler draws noise, or
            the pipeline's has a grid that DDIM does not have.
    """
    given = pipe.scheduler if scheduler is None else scheduler
    if (kind := prediction_type(given)) != (own := prediction_type(pipe.scheduler)):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} is for models that predict {kind}, this one predicts {own}."
        )
    require_deterministic(given)
    plain = FlowMatchEulerDiscreteScheduler if kind == "flow" else DDIMScheduler
    if isinstance(given, plain | ConsistencySolverScheduler):
        return fresh_copy(given)
    if scheduler is not None:
        raise ValueError(
            f"scheduler={type(scheduler).__name__}: HiFlow's stages are walked by {plain.__name__} or "
            "ConsistencySolverScheduler."
        )
    if kind != "flow":
        _check_grid_of_ddim(given)
    return first_order(given)


def _check_grid_of_ddim(scheduler: SchedulerMixin) -> None:
    """Raises ValueError where the points of a scheduler of an ε- or v-model are not those of evenly spaced times."""
    takes = inspect.signature(type(scheduler).__init__).parameters  # a configuration also keeps what others said
    grids = [name for name in OTHER_GRIDS if name in takes and scheduler.config.get(name)]
    if grids or isinstance(scheduler, LCMScheduler | TCDScheduler):
        raise ValueError(
            f"{type(scheduler).__name__}{f' with {grids[0]}' if grids else ''} walks a grid of its own, and HiFlow's "
            "stages are walked by DDIM on evenly spaced times: if those are what is meant, say so with "
            "scheduler=DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)."
        )


def first_order(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Euler of flow models or DDIM, with the scheduler's noise schedule and its spacing or shift of times.

    DDIM clips x_0 to [-1, 1] by default; latents are larger, and only a scheduler that says so itself means them.
    """
    config = scheduler.config
    if not is_flow(scheduler):
        return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    shift = config.get("shift", config.get("flow_shift"))  # the latter is that of multistep solvers in flow mode
    return FlowMatchEulerDiscreteScheduler.from_config(config, **({} if shift is None else {"shift": shift}))
